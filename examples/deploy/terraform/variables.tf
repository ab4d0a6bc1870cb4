variable "region" {
  description = "AWS region."
  type        = string
}

variable "name" {
  description = "Prefix of the names of documents, policies, rule and alarm."
  type        = string
  default     = "chaos"

  validation {
    condition     = can(regex("^[a-zA-Z0-9_-]{3,40}$", var.name)) && !can(regex("^(aws|amazon)", lower(var.name)))
    error_message = "The name is 3 to 40 letters, digits, - and _, and does not begin with aws or amazon."
  }
}

variable "parameter_name" {
  description = "The SSM parameter that steers chaos."
  type        = string
  default     = "/team/stage/chaos"
}

variable "tags" {
  description = "Tags of everything."
  type        = map(string)
  default     = { app = "chaos.h" }
}

# ---- who may ----

variable "attach_policies" {
  description = "Create the policies and attach them. false for accounts that deny IAM writes (AWS Academy); then hand the outputs policy_* to who may."
  type        = bool
  default     = true
}

variable "instance_role_name" {
  description = "Existing role of the instances that run chaos-proxy; gets the agent's policies. It needs AmazonSSMManagedInstanceCore already, as for any Run Command."
  type        = string
  default     = "LabRole"
}

variable "operator_role_name" {
  description = "Existing role of who steers experiments (people, or the pipeline of set-chaos.yml); null = the policy is created, not attached."
  type        = string
  default     = null
}

# ---- what runs where ----

variable "image" {
  description = "chaos-proxy's image, target ssm of the Dockerfile, REGISTRY/NAME:TAG or @DIGEST."
  type        = string

  validation {
    condition     = can(regex("^[a-zA-Z0-9][a-zA-Z0-9._:/@-]{0,254}$", var.image))
    error_message = "The image is REGISTRY/NAME:TAG or REGISTRY/NAME@sha256:DIGEST."
  }
}

variable "ecr_repository" {
  description = "The ECR repository the image is pulled from."
  type        = string
  default     = "chaos-proxy"
}

variable "target_tag_key" {
  description = "The documents may be sent to instances with this tag only."
  type        = string
  default     = "chaos"
}

variable "target_tag_value" {
  description = "The value of that tag."
  type        = string
  default     = "canary"
}

variable "service_port" {
  description = "The port the service is reached at; requests to it are led into the proxy."
  type        = number
  default     = 8080
}

variable "proxy_port" {
  description = "The proxy's own port; leave it closed in the security group (a firewalld on the instance must let it in)."
  type        = number
  default     = 18080
}

variable "log_group" {
  description = "The log group of chaos-proxy."
  type        = string
  default     = "/chaos/proxy"
}

variable "launch_template_name" {
  description = "Create a launch template with the metadata options; null = none."
  type        = string
  default     = null
}

# ---- the gate ----

variable "alarm_names" {
  description = "Existing CloudWatch alarms of this account and region that turn chaos off when they fire."
  type        = list(string)
  default     = []
}

variable "alb_arn_suffix" {
  description = "app/NAME/ID of a load balancer: an alarm on its share of 5xx is created for the gate; null = none."
  type        = string
  default     = null
}

variable "abort_percent" {
  description = "The share of 5xx, in percent, at which that alarm fires (2 of 3 minutes)."
  type        = number
  default     = 3
}

variable "gate_role_arn" {
  description = "Existing role for the gate, trusted by events.amazonaws.com and ssm.amazonaws.com; null = create it (needs attach_policies)."
  type        = string
  default     = null
}
