import boto3

OFF = '{"enabled":false}'


def off(events, context):
    """The step of the gate: writes OFF whatever is stored, and makes sure."""
    ssm = boto3.client("ssm", region_name=events["region"])
    version = ssm.put_parameter(Name=events["name"], Value=OFF, Overwrite=True)["Version"]
    stored = ssm.get_parameter(Name=events["name"])["Parameter"]["Value"]
    if stored != OFF:
        raise RuntimeError("written, but somebody else wrote in between")
    return {"version": version, "value": stored}
