# Puts chaos-proxy where services on AWS can take it: the image into ECR, the parameter into SSM, on request the rest by Terraform.
# It never turns chaos on: all it ever writes is off.json. What is there already is left as it is, so it may be run again.
# deploy-chaos.sh is the same for a Unix shell, line by line; tests/peers/deploy.py compares the two. Windows PowerShell 5.1 or newer.
$ErrorActionPreference = 'Stop'
$PSNativeCommandUseErrorActionPreference = $false # exit codes are looked at here

$region = if ($env:AWS_REGION) { $env:AWS_REGION } else { "$env:AWS_DEFAULT_REGION" }
$parameter = '/team/stage/chaos'; $image = 'chaos-proxy:latest'; $target = 'ssm'
$no_image = $false; $terraform = $false; $approve = 'false'; $dry = $false
$here = 'examples/deploy'; $tf = 'examples/deploy/terraform'; $address = 'module.parameter.aws_ssm_parameter.this'
$answer = ''; $reason = ''

function Usage {
    Write-Host @'
usage: deploy-chaos [--region REGION] [--parameter NAME] [--image NAME[:TAG]] ...

  --region REGION     AWS region [AWS_REGION, else AWS_DEFAULT_REGION]
  --parameter NAME    the SSM parameter that steers chaos [/team/stage/chaos]
  --image NAME[:TAG]  repository in ECR, created where it is missing, and tag [chaos-proxy:latest]
  --target TARGET     which image: ssm (with libcurl and certificates) or proxy (one static program) [ssm]
  --no-image          build and push none
  --terraform         apply examples/deploy/terraform, which asks first; these flags go before its terraform.tfvars
  --yes               with --terraform: do not ask
  --dry-run           print every command, run none
  --help              print this

Credentials are those of the aws-cli. For another architecture set DOCKER_DEFAULT_PLATFORM, to linux/arm64 for instance.
Exit code: 0 done; 1 could not, and why; 2 bad usage. After a failure, run it again: what was done is left as it is.
'@
}

function Fail([string]$text, [int]$code = 1) {
    [Console]::Error.WriteLine("deploy-chaos: $($text -replace '\s*\n', ' ')")
    exit $code
}

function Step([string]$text) { Write-Host "# $text" }

# The command as one could type it.
function Show([string[]]$command) {
    $words = foreach ($word in $command) {
        if ($word -ceq '|' -or $word -cmatch '\A[A-Za-z0-9_./:=@%+,-]+\z') { $word } else { "'$word'" }
    }
    Write-Host ($words -join ' ')
}

# Run WHY COMMAND
function Run([string]$why, [string[]]$command) {
    Show $command
    if ($dry) { return }
    $program, $words = $command
    $global:LASTEXITCODE = 0
    try { & $program @words } catch { Fail "${why}: $_" }
    if ($LASTEXITCODE -ne 0) { Fail "${why}: '$($command[0]) $($command[1])' ended with exit code $LASTEXITCODE" }
}

# What a program wrote to stderr comes as error records.
function LastSaid($lines) {
    $said = @($lines | Where-Object { $_ -is [System.Management.Automation.ErrorRecord] -and "$_".Trim() })
    if ($said.Count -gt 0) { "$($said[-1])".Trim() } else { 'it does not say why' }
}

# Capture COMMAND: what it prints is in $answer; when it fails, what it said last is in $reason.
function Capture([string[]]$command) {
    $ErrorActionPreference = 'Continue' # in here: stderr is no exception
    $program, $words = $command
    $lines = @(& $program @words 2>&1)
    $script:answer = @($lines | Where-Object { $_ -isnot [System.Management.Automation.ErrorRecord] }) -join "`n"
    $script:reason = ''
    if ($LASTEXITCODE -eq 0) { return $true }
    $script:reason = LastSaid $lines
    return $false
}

# Ask COMMAND: the same, and it is shown.
function Ask([string[]]$command) {
    Show $command
    $script:answer = ''; $script:reason = ''
    if ($dry) { return $true }
    return (Capture $command)
}

function Need([string]$program) {
    if (-not $dry -and -not (Get-Command $program -ErrorAction SilentlyContinue)) { Fail "$program is not installed, or not on the PATH" }
}

function Matches([string]$text, [string]$pattern) { $text.Replace("`n", '?') -cmatch "\A(?:$pattern)\z" }

# Whether the parameter is there. One that is on is somebody's experiment: refused, even where nothing would be written to it.
function FindParameter {
    if (Ask @('aws', 'ssm', 'get-parameter', '--name', $parameter, '--with-decryption', '--query', 'Parameter.Value', '--output', 'text',
            '--region', $region)) {
        $value = $answer -replace '\s+', ' '
        $until = if ($value -cmatch '.*"expiresAt" *: *"?([^",}]*)') { $Matches[1] } else { '60 minutes after its last change' }
        if ($value.Replace(' ', '').Contains('"enabled":true')) {
            Fail "parameter $parameter is in use until ${until}: $value; end that first: chaos-ssm disable --name $parameter"
        }
        return $true
    }
    if ($reason.Contains('ParameterNotFound')) { return $false }
    Fail "cannot read parameter ${parameter}: $reason"
}

for ($i = 0; $i -lt $args.Count; $i++) {
    $flag = [string]$args[$i]
    if ($flag -cmatch '\A--(region|parameter|image|target)\z') {
        $i++
        $given = if ($i -lt $args.Count) { [string]$args[$i] } else { '' }
        if (-not $given) { Fail "$flag needs a value (see --help)" 2 }
        switch -CaseSensitive ($flag) {
            '--region' { $region = $given }
            '--parameter' { $parameter = $given }
            '--image' { $image = $given }
            '--target' { $target = $given }
        }
        continue
    }
    switch -CaseSensitive ($flag) {
        '--no-image' { $no_image = $true }
        '--terraform' { $terraform = $true }
        '--yes' { $approve = 'true' }
        '--dry-run' { $dry = $true }
        '--help' { Usage; exit 0 }
        default { Fail "unknown flag '$flag' (see --help)" 2 }
    }
}

$repository = $image -replace ':[^:]*\z', ''; $tag = 'latest'
if ($image.Contains(':')) { $tag = $image.Split(':')[-1] }
if (-not $region) { Fail 'no region: give --region, or set AWS_REGION' 2 }
if (-not (Matches $region '[a-z]{2}(-[a-z]+)+-[0-9]+')) { Fail "--region: '$region' is no region" 2 }
if (-not (Matches $parameter '(/[a-zA-Z0-9_.-]+){1,15}')) {
    Fail "--parameter: '$parameter' is not /LEVEL/LEVEL of letters, digits and _.-" 2
}
if (Matches $parameter '/(aws|ssm).*') { Fail "--parameter: '$parameter' belongs to AWS, as all that begin with /aws or /ssm" 2 }
if (-not (Matches $repository '[a-z0-9]+([._-][a-z0-9]+)*(/[a-z0-9]+([._-][a-z0-9]+)*)*')) {
    Fail "--image: '$repository' is no name of a repository: lower case, digits, and single . _ - / between them" 2
}
if (Matches $repository '[^/]*[.].*/.*') { Fail "--image: '$image' names a registry: repository and tag are enough" 2 }
if (-not (Matches $tag '[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,127}')) { Fail "--image: '$tag' is no tag" 2 }
if (-not (Matches $target 'proxy|ssm')) { Fail "--target: '$target' is neither ssm nor proxy" 2 }

Push-Location (Join-Path $PSScriptRoot '../..')
try {
    Step 'check: nothing is changed here'
    Need aws
    if (-not $no_image) { Need docker }
    if ($terraform) { Need terraform }
    if (-not (Ask @('aws', 'sts', 'get-caller-identity', '--query', 'Account', '--output', 'text', '--region', $region))) {
        Fail "no valid credentials: $reason"
    }
    $account = $answer; $domain = 'amazonaws.com'
    if ($dry) { $account = 'ACCOUNT' }
    if (Matches $region 'cn-.*') { $domain = 'amazonaws.com.cn' }
    $registry = "$account.dkr.ecr.$region.$domain"
    $repository_there = $true; $parameter_there = $true
    if (-not $no_image) {
        if (-not (Ask @('docker', 'version'))) { Fail "docker does not answer: $reason" }
        if (-not (Ask @('aws', 'ecr', 'describe-repositories', '--repository-names', $repository, '--region', $region))) {
            $repository_there = $false
            if (-not (Matches $reason '.*RepositoryNotFoundException.*')) { Fail "cannot read repository ${repository}: $reason" }
        }
    }
    $parameter_there = FindParameter

    Step 'settings for terraform'
    if ($dry -or -not (Test-Path "$tf/terraform.tfvars")) {
        Run 'cannot copy the template' @('cp', "$tf/terraform.tfvars.example", "$tf/terraform.tfvars")
    }

    if ($terraform) {
        Step 'terraform'
        Run 'cannot prepare terraform' @('terraform', "-chdir=$tf", 'init', '-input=false')
        if (-not (Ask @('terraform', "-chdir=$tf", 'output', '-no-color', '-raw', 'config_source'))) { $answer = '' }
        if (-not $dry) {
            if (-not (Matches $answer 'ssm:.*')) { $answer = '' }
            if ($answer -and $answer -cne "ssm:${parameter}?region=$region") {
                Fail "terraform's state holds $answer, and an apply would remove that: name it, or use another workspace"
            }
            if (-not $answer -and $parameter_there) {
                Fail "parameter $parameter is not in terraform's state: in $tf, terraform import -var region=$region $address $parameter"
            }
        }
        Run 'terraform failed' @('terraform', "-chdir=$tf", 'apply', "-auto-approve=$approve", '-var', "region=$region",
            '-var', "parameter_name=$parameter", '-var', "ecr_repository=$repository", '-var', "image=$registry/${repository}:$tag")
    }

    if (-not $no_image) {
        Step 'image'
        Run 'cannot build the image' @('docker', 'build', '-f', "$here/Dockerfile", '--target', $target,
            '-t', "$registry/${repository}:$tag", '.')
        if ($dry -or -not $repository_there) {
            if (-not (Ask @('aws', 'ecr', 'create-repository', '--repository-name', $repository, '--region', $region))) {
                Fail "cannot create repository ${repository}: $reason"
            }
        }
        Show @('aws', 'ecr', 'get-login-password', '--region', $region, '|', 'docker', 'login',
            '--username', 'AWS', '--password-stdin', $registry)
        if (-not $dry) {
            if (-not (Capture @('aws', 'ecr', 'get-login-password', '--region', $region))) { Fail "no password for ${registry}: $reason" }
            $ErrorActionPreference = 'Continue'
            $lines = @($answer | docker login --username AWS --password-stdin $registry 2>&1)
            if ($LASTEXITCODE -ne 0) {
                $reason = LastSaid $lines
                Fail "cannot log in to ${registry}: $reason"
            }
            $ErrorActionPreference = 'Stop'
        }
        Run 'cannot push the image' @('docker', 'push', "$registry/${repository}:$tag")
    }

    Step 'parameter'
    if (-not $dry -and (FindParameter)) {
        Step "$parameter is there, and off: left as it is"
    } else {
        if (-not (Ask @('aws', 'ssm', 'put-parameter', '--name', $parameter, '--type', 'String', '--value', "file://$here/off.json",
                    '--region', $region))) {
            Fail "cannot create parameter ${parameter}: $reason"
        }
    }
    Step "done, and chaos is off: chaos-ssm put --name $parameter starts an experiment, chaos-ssm disable --name $parameter ends it"
} finally {
    Pop-Location
}
