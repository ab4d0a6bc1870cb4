output "parameter_name" {
  value = module.parameter.name
}

output "config_source" {
  description = "For chaos-proxy --config, or CHAOS_CONFIG."
  value       = "ssm:${module.parameter.name}?region=${var.region}"
}

output "start_command" {
  description = "One instance after the other, stops at the first failure."
  value = join(" ", [
    "aws ssm send-command --region ${var.region} --document-name ${aws_ssm_document.start.name}",
    "--targets Key=tag:${var.target_tag_key},Values=${var.target_tag_value} --max-concurrency 1 --max-errors 0",
  ])
}

output "stop_command" {
  description = "All instances at once, whatever fails. A start that is still under way is cancelled first: aws ssm cancel-command."
  value = join(" ", [
    "aws ssm send-command --region ${var.region} --document-name ${aws_ssm_document.stop.name}",
    "--targets Key=tag:${var.target_tag_key},Values=${var.target_tag_value} --max-concurrency 100% --max-errors 100%",
  ])
}

output "off_command" {
  description = "The rollback, for everything that reads the parameter."
  value       = "aws ssm put-parameter --region ${var.region} --name ${module.parameter.name} --overwrite --value '{\"enabled\":false}'"
}

output "hop_limit_command" {
  description = "For an instance that runs already (container on a bridge network only; the documents use the host's)."
  value       = "aws ec2 modify-instance-metadata-options --region ${var.region} --instance-id INSTANCE --http-tokens required --http-put-response-hop-limit 2"
}

output "gate" {
  description = "The alarms that turn chaos off; empty = there is no gate."
  value       = local.gate_alarms
}

output "policy_agent" {
  description = "For the instance role, with policy_pull and policy_logs, where attach_policies is false."
  value       = data.aws_iam_policy_document.agent.json
}

output "policy_pull" {
  value = data.aws_iam_policy_document.pull.json
}

output "policy_logs" {
  value = data.aws_iam_policy_document.logs.json
}

output "policy_operator" {
  value = data.aws_iam_policy_document.operator.json
}
