#!/bin/sh
# The users' database is another one than that of the runs, and its settings are a file: written
# here, where the secrets are, and not kept in an image.
set -eu
umask 077
cat > /tmp/auth.ini <<INI
[mlflow]
default_permission = READ
database_uri = postgresql+psycopg://mlflow:${POSTGRES_PASSWORD}@postgres:5432/mlflow_auth
admin_username = admin
admin_password = ${ADMIN_PASSWORD}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
INI
export MLFLOW_AUTH_CONFIG_PATH=/tmp/auth.ini
exec mlflow server --host 0.0.0.0 --port 5000 --app-name basic-auth \
  --backend-store-uri "postgresql+psycopg://mlflow:${POSTGRES_PASSWORD}@postgres:5432/mlflow" \
  --artifacts-destination s3://mlflow/artifacts \
  --allowed-hosts "$ALLOWED_HOSTS"
