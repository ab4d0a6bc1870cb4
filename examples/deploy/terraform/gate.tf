# The fleet gate: an alarm fires -> EventBridge -> Automation -> the parameter says {"enabled":false}. Each process is
# off within its TTL, whoever started the experiment. It acts when an alarm *becomes* ALARM: do not start an experiment
# while one is in that state.
#
# Not run here: EventBridge starting the Automation; the step itself is cut out of the document and run.

resource "aws_cloudwatch_metric_alarm" "abort" {
  count               = var.alb_arn_suffix == null ? 0 : 1
  alarm_name          = "${var.name}-abort"
  alarm_description   = "Abort rule of chaos experiments: share of 5xx behind ${var.alb_arn_suffix}"
  comparison_operator = "GreaterThanThreshold"
  threshold           = var.abort_percent
  evaluation_periods  = 3
  datapoints_to_alarm = 2
  treat_missing_data  = "notBreaching"

  metric_query {
    id          = "share"
    label       = "5xx in percent"
    expression  = "100 * (FILL(errors, 0) + FILL(elb, 0)) / IF(FILL(requests, 0) > 0, FILL(requests, 0), 1)"
    return_data = true
  }

  dynamic "metric_query" {
    # elb: its own, when no target answers; with no target at all no request is counted, so it is divided by 1
    for_each = { errors = "HTTPCode_Target_5XX_Count", elb = "HTTPCode_ELB_5XX_Count", requests = "RequestCount" }
    content {
      id = metric_query.key
      metric {
        namespace   = "AWS/ApplicationELB"
        metric_name = metric_query.value
        dimensions  = { LoadBalancer = var.alb_arn_suffix }
        period      = 60
        stat        = "Sum"
      }
    }
  }
}

locals {
  gate_alarms = concat(
    [for name in var.alarm_names : "${local.prefix}:cloudwatch:${var.region}:${local.account}:alarm:${name}"],
    aws_cloudwatch_metric_alarm.abort[*].arn,
  )
  gate      = length(var.alarm_names) > 0 || var.alb_arn_suffix != null
  gate_name = "${var.name}-gate-off"
  gate_role = local.gate ? (var.gate_role_arn != null ? var.gate_role_arn : one(aws_iam_role.gate[*].arn)) : null
}

resource "aws_ssm_document" "gate" {
  count           = local.gate ? 1 : 0
  name            = local.gate_name
  document_type   = "Automation"
  document_format = "JSON"

  content = jsonencode({
    schemaVersion = "0.3"
    description   = "Turns chaos off: writes {\"enabled\":false} into ${module.parameter.name}"
    assumeRole    = local.gate_role
    mainSteps = [{
      name           = "off"
      action         = "aws:executeScript"
      timeoutSeconds = 60
      maxAttempts    = 3
      isEnd          = true
      inputs = {
        Runtime      = "python3.11"
        Handler      = "off"
        Script       = file("${path.module}/scripts/gate.py")
        InputPayload = { name = module.parameter.name, region = var.region }
      }
    }]
  })
}

resource "aws_cloudwatch_event_rule" "gate" {
  count       = local.gate ? 1 : 0
  name        = local.gate_name
  description = "An alarm fired: chaos off"

  event_pattern = jsonencode({
    source        = ["aws.cloudwatch"]
    "detail-type" = ["CloudWatch Alarm State Change"]
    resources     = local.gate_alarms
    detail        = { state = { value = ["ALARM"] } }
  })
}

resource "aws_cloudwatch_event_target" "gate" {
  count     = local.gate ? 1 : 0
  rule      = aws_cloudwatch_event_rule.gate[0].name
  target_id = local.gate_name
  arn       = "${local.prefix}:ssm:${var.region}:${local.account}:automation-definition/${aws_ssm_document.gate[0].name}:$DEFAULT"
  role_arn  = local.gate_role
  input     = jsonencode({}) # else the event is, and the document has no such parameters

  lifecycle {
    precondition {
      condition     = var.attach_policies || var.gate_role_arn != null
      error_message = "The gate needs a role: with attach_policies = false set gate_role_arn (in AWS Academy the ARN of LabRole)."
    }
  }
}

# ---- its role, when none is given ----

data "aws_iam_policy_document" "gate_trust" {
  statement {
    actions = ["sts:AssumeRole"]

    principals {
      type        = "Service"
      identifiers = ["events.amazonaws.com", "ssm.amazonaws.com"]
    }

    condition { # nobody else's rule or automation
      test     = "StringEquals"
      variable = "aws:SourceAccount"
      values   = [local.account]
    }
  }
}

data "aws_iam_policy_document" "gate" {
  statement {
    sid       = "ChaosOff"
    actions   = ["ssm:GetParameter", "ssm:PutParameter"]
    resources = [module.parameter.arn]
  }

  statement {
    sid     = "ChaosGate"
    actions = ["ssm:StartAutomationExecution"]
    resources = [
      "${local.prefix}:ssm:${var.region}:${local.account}:automation-definition/${local.gate_name}:*",
      "${local.prefix}:ssm:${var.region}:${local.account}:document/${local.gate_name}",
    ]
  }

  statement {
    sid       = "ChaosGateRole"
    actions   = ["iam:PassRole"]
    resources = aws_iam_role.gate[*].arn

    condition {
      test     = "StringEquals"
      variable = "iam:PassedToService"
      values   = ["ssm.amazonaws.com"]
    }
  }
}

resource "aws_iam_role" "gate" {
  count              = local.gate && var.gate_role_arn == null && var.attach_policies ? 1 : 0
  name               = "${var.name}-gate"
  description        = "The gate of chaos.h: may turn it off"
  assume_role_policy = data.aws_iam_policy_document.gate_trust.json
}

resource "aws_iam_role_policy" "gate" {
  count  = length(aws_iam_role.gate)
  name   = "off"
  role   = aws_iam_role.gate[0].id
  policy = data.aws_iam_policy_document.gate.json
}
