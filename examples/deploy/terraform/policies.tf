# Least privilege: processes read one parameter, operators also write it; documents go to tagged instances only.

data "aws_iam_policy_document" "agent" {
  statement {
    sid       = "ChaosRead"
    actions   = ["ssm:GetParameter"]
    resources = [module.parameter.arn]
  }
}

data "aws_iam_policy_document" "pull" {
  statement {
    sid       = "EcrLogin"
    actions   = ["ecr:GetAuthorizationToken"]
    resources = ["*"] # it knows no resources
  }

  statement {
    sid       = "EcrPull"
    actions   = ["ecr:BatchCheckLayerAvailability", "ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer"]
    resources = ["${local.prefix}:ecr:${var.region}:${local.account}:repository/${var.ecr_repository}"]
  }
}

data "aws_iam_policy_document" "logs" {
  statement {
    sid       = "ChaosLogs"
    actions   = ["logs:CreateLogStream", "logs:PutLogEvents"]
    resources = ["${local.prefix}:logs:${var.region}:${local.account}:log-group:${var.log_group}:*"]
  }
}

data "aws_iam_policy_document" "operator" {
  statement {
    sid       = "ChaosSteer"
    actions   = ["ssm:GetParameter", "ssm:PutParameter"]
    resources = [module.parameter.arn]
  }

  statement {
    sid       = "ChaosStopAll" # disable --path; of what it finds it writes the parameter above only
    actions   = ["ssm:GetParametersByPath"]
    resources = ["${local.prefix}:ssm:${var.region}:${local.account}:parameter${replace(module.parameter.name, "/[^/]+$/", "")}*"]
  }

  statement {
    sid       = "ChaosDocuments"
    actions   = ["ssm:SendCommand"]
    resources = [aws_ssm_document.start.arn, aws_ssm_document.stop.arn]
  }

  statement {
    sid       = "ChaosInstances"
    actions   = ["ssm:SendCommand"]
    resources = ["${local.prefix}:ec2:${var.region}:${local.account}:instance/*"]

    condition {
      test     = "StringEquals"
      variable = "ssm:resourceTag/${var.target_tag_key}"
      values   = [var.target_tag_value]
    }
  }

  statement {
    sid       = "ChaosWatch"
    actions   = ["ssm:GetCommandInvocation", "ssm:ListCommandInvocations", "ssm:ListCommands"]
    resources = ["*"] # they know no resources
  }

  statement {
    sid       = "ChaosCancel" # a start that still goes from instance to instance
    actions   = ["ssm:CancelCommand"]
    resources = ["*"] # it knows none either: any command of the account
  }
}

locals {
  policies = {
    agent    = { document = data.aws_iam_policy_document.agent.json, role = var.instance_role_name }
    pull     = { document = data.aws_iam_policy_document.pull.json, role = var.instance_role_name }
    logs     = { document = data.aws_iam_policy_document.logs.json, role = var.instance_role_name }
    operator = { document = data.aws_iam_policy_document.operator.json, role = var.operator_role_name }
  }
}

resource "aws_iam_policy" "chaos" {
  for_each    = var.attach_policies ? local.policies : {}
  name        = "${var.name}-${each.key}"
  description = "chaos.h: ${each.key}"
  policy      = each.value.document
}

resource "aws_iam_role_policy_attachment" "chaos" {
  for_each   = var.attach_policies ? { for key, policy in local.policies : key => policy if policy.role != null } : {}
  role       = each.value.role
  policy_arn = aws_iam_policy.chaos[each.key].arn
}
