#!/bin/sh
# Puts chaos-proxy where services on AWS can take it: the image into ECR, the parameter into SSM, on request the rest by Terraform.
# It never turns chaos on: all it ever writes is off.json. What is there already is left as it is, so it may be run again.
# deploy-chaos.ps1 is the same for PowerShell, line by line; tests/peers/deploy.py compares the two.
set -eu
export MSYS_NO_PATHCONV=1 # Git Bash: /team/stage/chaos is no path

region=${AWS_REGION:-${AWS_DEFAULT_REGION:-}} parameter=/team/stage/chaos image=chaos-proxy:latest target=ssm
no_image='' terraform='' approve=false dry=''
here=examples/deploy tf=examples/deploy/terraform address=module.parameter.aws_ssm_parameter.this

usage() {
    cat <<'TEXT'
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
TEXT
}

fail() {
    printf 'deploy-chaos: %s\n' "$1" | tr '\n' ' ' | sed 's/ $//' >&2
    echo >&2
    exit "${2:-1}"
}

step() { printf '# %s\n' "$1"; }

# The command as one could type it.
show() {
    for word; do
        case $word in
        '|') ;;
        *[!A-Za-z0-9_./:=@%+,-]* | '') word="'$word'" ;;
        esac
        printf '%s ' "$word"
    done | sed 's/ $//'
    echo
}

# run WHY COMMAND...
run() {
    why=$1
    shift
    show "$@"
    if [ -n "$dry" ]; then return; fi
    "$@" || fail "$why: '$1 $2' ended with exit code $?"
}

last_said() { grep '[^[:space:]]' "$said" | tail -n 1 | tr -d '\r' | grep . || echo 'it does not say why'; }

# capture COMMAND...: what it prints is in $answer; when it fails, what it said last is in $reason.
capture() {
    answer='' reason=''
    if answer=$("$@" 2>"$said"); then return 0; fi
    reason=$(last_said)
    return 1
}

# ask COMMAND...: the same, and it is shown.
ask() {
    show "$@"
    answer='' reason=''
    if [ -n "$dry" ]; then return 0; fi
    capture "$@"
}

need() { [ -n "$dry" ] || command -v "$1" >/dev/null || fail "$1 is not installed, or not on the PATH"; }

matches() { printf '%s' "$1" | tr '\n' '?' | LC_ALL=C grep -qxE -- "$2"; }

# Whether the parameter is there. One that is on is somebody's experiment: refused, even where nothing would be written to it.
find_parameter() {
    if ask aws ssm get-parameter --name "$parameter" --with-decryption --query Parameter.Value --output text --region "$region"; then
        value=$(printf %s "$answer" | tr -s '[:space:]' ' ')
        until=$(printf %s "$value" | sed -n 's/.*"expiresAt" *: *"\{0,1\}\([^",}]*\).*/\1/p')
        if [ -z "$until" ]; then until='60 minutes after its last change'; fi
        case $(printf %s "$value" | tr -d ' ') in
        *'"enabled":true'*)
            fail "parameter $parameter is in use until $until: $value; end that first: chaos-ssm disable --name $parameter"
            ;;
        esac
        return 0
    fi
    case $reason in
    *ParameterNotFound*) return 1 ;;
    esac
    fail "cannot read parameter $parameter: $reason"
}

while [ $# -gt 0 ]; do
    flag=$1
    case $flag in
    --region | --parameter | --image | --target)
        if [ -z "${2-}" ]; then fail "$flag needs a value (see --help)" 2; fi
        case $flag in
        --region) region=$2 ;;
        --parameter) parameter=$2 ;;
        --image) image=$2 ;;
        --target) target=$2 ;;
        esac
        shift
        ;;
    --no-image) no_image=1 ;;
    --terraform) terraform=1 ;;
    --yes) approve=true ;;
    --dry-run) dry=1 ;;
    --help)
        usage
        exit 0
        ;;
    *) fail "unknown flag '$flag' (see --help)" 2 ;;
    esac
    shift
done

repository=${image%:*} tag=latest
case $image in *:*) tag=${image##*:} ;; esac
if [ -z "$region" ]; then fail 'no region: give --region, or set AWS_REGION' 2; fi
matches "$region" '[a-z]{2}(-[a-z]+)+-[0-9]+' || fail "--region: '$region' is no region" 2
matches "$parameter" '(/[a-zA-Z0-9_.-]+){1,15}' || fail "--parameter: '$parameter' is not /LEVEL/LEVEL of letters, digits and _.-" 2
if matches "$parameter" '/(aws|ssm).*'; then fail "--parameter: '$parameter' belongs to AWS, as all that begin with /aws or /ssm" 2; fi
matches "$repository" '[a-z0-9]+([._-][a-z0-9]+)*(/[a-z0-9]+([._-][a-z0-9]+)*)*' ||
    fail "--image: '$repository' is no name of a repository: lower case, digits, and single . _ - / between them" 2
if matches "$repository" '[^/]*[.].*/.*'; then fail "--image: '$image' names a registry: repository and tag are enough" 2; fi
matches "$tag" '[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,127}' || fail "--image: '$tag' is no tag" 2
matches "$target" 'proxy|ssm' || fail "--target: '$target' is neither ssm nor proxy" 2

cd "$(dirname "$0")/../.."
if [ -z "$dry" ]; then
    said=$(mktemp) || fail 'cannot create a temporary file'
    trap 'rm -f "$said"' EXIT
    trap 'exit 130' INT TERM HUP
fi

step 'check: nothing is changed here'
need aws
if [ -z "$no_image" ]; then need docker; fi
if [ -n "$terraform" ]; then need terraform; fi
ask aws sts get-caller-identity --query Account --output text --region "$region" || fail "no valid credentials: $reason"
account=$answer domain=amazonaws.com
if [ -n "$dry" ]; then account=ACCOUNT; fi
if matches "$region" 'cn-.*'; then domain=amazonaws.com.cn; fi
registry=$account.dkr.ecr.$region.$domain
repository_there=1 parameter_there=1
if [ -z "$no_image" ]; then
    ask docker version || fail "docker does not answer: $reason"
    if ! ask aws ecr describe-repositories --repository-names "$repository" --region "$region"; then
        repository_there=''
        if ! matches "$reason" '.*RepositoryNotFoundException.*'; then fail "cannot read repository $repository: $reason"; fi
    fi
fi
find_parameter || parameter_there=''

step 'settings for terraform'
if [ -n "$dry" ] || [ ! -e "$tf/terraform.tfvars" ]; then
    run 'cannot copy the template' cp "$tf/terraform.tfvars.example" "$tf/terraform.tfvars"
fi

if [ -n "$terraform" ]; then
    step 'terraform'
    run 'cannot prepare terraform' terraform "-chdir=$tf" init -input=false
    ask terraform "-chdir=$tf" output -no-color -raw config_source || answer=''
    if [ -z "$dry" ]; then
        if ! matches "$answer" 'ssm:.*'; then answer=''; fi
        if [ -n "$answer" ] && [ "$answer" != "ssm:$parameter?region=$region" ]; then
            fail "terraform's state holds $answer, and an apply would remove that: name it, or use another workspace"
        fi
        if [ -z "$answer" ] && [ -n "$parameter_there" ]; then
            fail "parameter $parameter is not in terraform's state: in $tf, terraform import -var region=$region $address $parameter"
        fi
    fi
    run 'terraform failed' terraform "-chdir=$tf" apply "-auto-approve=$approve" -var "region=$region" \
        -var "parameter_name=$parameter" -var "ecr_repository=$repository" -var "image=$registry/$repository:$tag"
fi

if [ -z "$no_image" ]; then
    step 'image'
    run 'cannot build the image' docker build -f "$here/Dockerfile" --target "$target" -t "$registry/$repository:$tag" .
    if [ -n "$dry" ] || [ -z "$repository_there" ]; then
        ask aws ecr create-repository --repository-name "$repository" --region "$region" ||
            fail "cannot create repository $repository: $reason"
    fi
    show aws ecr get-login-password --region "$region" '|' docker login --username AWS --password-stdin "$registry"
    if [ -z "$dry" ]; then
        capture aws ecr get-login-password --region "$region" || fail "no password for $registry: $reason"
        if ! printf '%s\n' "$answer" | docker login --username AWS --password-stdin "$registry" >/dev/null 2>"$said"; then
            reason=$(last_said)
            fail "cannot log in to $registry: $reason"
        fi
    fi
    run 'cannot push the image' docker push "$registry/$repository:$tag"
fi

step 'parameter'
if [ -z "$dry" ] && find_parameter; then
    step "$parameter is there, and off: left as it is"
else
    ask aws ssm put-parameter --name "$parameter" --type String --value "file://$here/off.json" --region "$region" ||
        fail "cannot create parameter $parameter: $reason"
fi
step "done, and chaos is off: chaos-ssm put --name $parameter starts an experiment, chaos-ssm disable --name $parameter ends it"
