# What every process on every node of a launched cluster finds in its environment. EDIT, then `ray up` again.
# No secrets in here: the token is in ~/.ray/auth_token, and access to storage comes with the node's role.

# Where runs are tracked, if anywhere; without it in sqlite on the head, which goes with the head.
# export MLFLOW_TRACKING_URI=http://mlflow.internal:5000

# Where s3:// run directories are, unless the node's role and region say it.
# export AWS_DEFAULT_REGION=us-west-2
# export AWS_ENDPOINT_URL=https://minio.internal:9000

export PALF_CACHE="$HOME/.palf_cache" # datasets; fetched by the driver once per head

# Nothing in the cluster answers without the token.
export RAY_AUTH_MODE=token

# A node that is cut off is given up after about 10 s; with Ray's own settings after a minute.
export RAY_health_check_initial_delay_ms=5000
export RAY_health_check_period_ms=1000
export RAY_health_check_timeout_ms=2000
export RAY_health_check_failure_threshold=5

export PATH="$HOME/palf_dist/.venv/bin:$PATH"
