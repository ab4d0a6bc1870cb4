# The parameter that steers chaos: born off, and never written again by Terraform.

terraform {
  required_version = ">= 1.3"
  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = ">= 5.0"
    }
  }
}

variable "name" {
  description = "Name of the parameter, beginning with /."
  type        = string

  validation {
    condition     = can(regex("^(/[a-zA-Z0-9_.-]+){1,15}$", var.name)) && !can(regex("^/(aws|ssm)", lower(var.name)))
    error_message = "The name is /LEVEL/LEVEL of letters, digits and _.- (at most 15 levels, not beginning with aws or ssm)."
  }
}

variable "tags" {
  description = "Tags of the parameter."
  type        = map(string)
  default     = {}
}

resource "aws_ssm_parameter" "this" {
  name        = var.name
  description = "Config of chaos.h; chaos-ssm disable --name ${var.name} turns it off"
  type        = "String"
  value       = jsonencode({ enabled = false }) # the safe default
  tags        = var.tags

  lifecycle {
    # Experiments are run by chaos-ssm; an apply must neither start nor end one. Any update in place also writes the value, as it was
    # at the refresh: so nothing that would be one is ever changed.
    ignore_changes = [value, type, key_id, tier, description, allowed_pattern]
  }
}

output "name" {
  value = aws_ssm_parameter.this.name
}

output "arn" {
  value = aws_ssm_parameter.this.arn
}
