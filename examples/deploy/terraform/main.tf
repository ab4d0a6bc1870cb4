# chaos.h on AWS: the parameter, who may read and write it, the documents that put chaos-proxy in front of a service on
# EC2, and the gate that turns it all off when an alarm fires.
#
#   cp terraform.tfvars.example terraform.tfvars     # then edit it
#   terraform init && terraform plan && terraform apply
#
# Nothing here ever turns chaos on.

terraform {
  required_version = ">= 1.3"
  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = ">= 5.0"
    }
  }
}

provider "aws" {
  region = var.region

  default_tags {
    tags = var.tags
  }
}

data "aws_caller_identity" "current" {}

data "aws_partition" "current" {}

locals {
  account = data.aws_caller_identity.current.account_id
  prefix  = "arn:${data.aws_partition.current.partition}"
}

module "parameter" {
  source = "./parameter"
  name   = var.parameter_name
}

resource "aws_cloudwatch_log_group" "chaos" {
  name              = var.log_group
  retention_in_days = 30
}

# For instances yet to come. The hop limit is 2 because a container on a bridge network is one hop further from the
# metadata service, where it gets its credentials; tokens are required, so nothing else is opened by that.
# Instances that run already: output hop_limit_command.
resource "aws_launch_template" "chaos" {
  count       = var.launch_template_name == null ? 0 : 1
  name        = var.launch_template_name
  description = "Metadata options that chaos-proxy needs in a container; take it as a base, or copy the block"

  metadata_options {
    http_endpoint               = "enabled"
    http_tokens                 = "required"
    http_put_response_hop_limit = 2
  }

  tag_specifications {
    resource_type = "instance"
    tags          = { (var.target_tag_key) = var.target_tag_value }
  }
}
