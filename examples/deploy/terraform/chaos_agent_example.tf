# SSM Run Command documents: chaos-proxy in front of a service on EC2 instances selected by tag, and away again.
# Outputs start_command and stop_command are how to send them.
#
#              port 8080, new connections                     127.0.0.1:8080
#   clients --------------+------ route in -------> chaos-proxy ------> service
#                         +------ route out ------------------------>
#
# The route is one jump in the nat table (iptables REDIRECT), for TCP from outside to the service's port. The kernel
# looks there at the first packet of a connection only: putting the route in or out breaks no connection, each one ends
# where it began. The service sees 127.0.0.1 as its client, and the real one in X-Forwarded-For. IPv6 is not led in.
#
# Where iptables filters what comes in, what was redirected is let in at the proxy's port, and nothing else, until stop.
# firewalld has chains of its own: it must let ProxyPort in.
#
#   start   container; healthy; a request through it is answered; then, last, the route in. Any failure undoes it all.
#   stop    first the route out; then faults off; then the connections in the proxy end (drain); last the container.
#   guard   takes the route out by itself, within 2 s when the proxy is gone, 5 s when it hangs, and when Minutes are over.
#           It runs beside the route, on the instance, and needs no network.
#
# Both may be sent twice. Where a load balancer sends the traffic, another route is the target group: register the
# instance with the proxy's port and deregister it with the service's port, then the other way round to go back; the
# deregistration delay is the drain.
#
# Needed on the instance: SSM agent, docker (or podman), iptables, curl, util-linux; aws-cli to pull from ECR.
# Not run here: SendCommand itself and the awslogs driver; the scripts are cut out of these documents by
# tests/peers/terraform.py and run with podman, a real chaos-proxy and real traffic.

locals {
  port = { type = "String", allowedPattern = "^[1-9][0-9]{0,4}$" } # what goes into a script matches a pattern: no quotes

  common_parameters = {
    Engine    = { type = "String", default = "docker", allowedValues = ["docker", "podman"] }
    AdminPort = merge(local.port, { default = "19090", description = "Of the proxy's /healthz and /metrics, on loopback" })
  }

  route_script = split("\n", trimspace(file("${path.module}/scripts/route.sh")))
  start_script = split("\n", trimspace(file("${path.module}/scripts/start.sh")))
  stop_script  = split("\n", trimspace(file("${path.module}/scripts/stop.sh")))
}

resource "aws_ssm_document" "start" {
  name            = "${var.name}-proxy-start"
  document_type   = "Command"
  document_format = "JSON"
  target_type     = "/AWS::EC2::Instance"

  content = jsonencode({
    schemaVersion = "2.2"
    description   = "Starts chaos-proxy in front of the service, then leads its traffic in. Turns no fault on."
    parameters = merge(local.common_parameters, {
      Image       = { type = "String", default = var.image, allowedPattern = "^[a-zA-Z0-9][a-zA-Z0-9._:/@-]{0,254}$" }
      Parameter   = { type = "String", default = module.parameter.name, allowedPattern = "^(/[a-zA-Z0-9_.-]+){1,15}$" }
      Region      = { type = "String", default = var.region, allowedPattern = "^[a-z]{2}(-[a-z]+)+-[0-9]+$" }
      ServicePort = merge(local.port, { default = tostring(var.service_port) })
      ProxyPort   = merge(local.port, { default = tostring(var.proxy_port) })
      LogGroup    = { type = "String", default = aws_cloudwatch_log_group.chaos.name, allowedPattern = "^[a-zA-Z0-9_./#-]*$", description = "For docker's awslogs driver; empty, or with podman: the engine's own log" }
      Minutes     = { type = "String", default = "60", allowedPattern = "^[1-9][0-9]{0,3}$", description = "After that the guard takes the route out" }
    })
    mainSteps = [{
      name         = "start"
      action       = "aws:runShellScript"
      precondition = { StringEquals = ["platformType", "Linux"] }
      inputs       = { timeoutSeconds = "300", runCommand = concat(local.route_script, local.start_script) }
    }]
  })
}

resource "aws_ssm_document" "stop" {
  name            = "${var.name}-proxy-stop"
  document_type   = "Command"
  document_format = "JSON"
  target_type     = "/AWS::EC2::Instance"

  content = jsonencode({
    schemaVersion = "2.2"
    description   = "Leads the traffic past chaos-proxy again, drains it, then stops it."
    parameters = merge(local.common_parameters, {
      DrainSeconds = { type = "String", default = "30", allowedPattern = "^[0-9]{1,3}$", description = "For connections in the proxy" }
    })
    mainSteps = [{
      name         = "stop"
      action       = "aws:runShellScript"
      precondition = { StringEquals = ["platformType", "Linux"] }
      inputs       = { timeoutSeconds = "1200", runCommand = concat(local.route_script, local.stop_script) }
    }]
  })
}
