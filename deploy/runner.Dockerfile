# Image of the pods of deployed workflows, without clients for databases, brokers or clusters, which a pod never uses.
#   docker build --file deploy/runner.Dockerfile --tag pilotflame-runner .
#
# A digest never changes its content. To update it, look up the current digest of the tag:
#   docker buildx imagetools inspect python:3.13-slim-trixie
ARG PYTHON_IMAGE=docker.io/library/python:3.13.15-slim-trixie@sha256:9d2e5553305c7c7b0097999bb17187c69b921ccd6bc9d40e4bb5ebe652c00285

FROM ${PYTHON_IMAGE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv --without-pip /opt/pilotflame
WORKDIR /source
COPY requirements.lock ./
# Wheels only: no third-party code runs during the installation, and no compiler is needed.
RUN pip --python /opt/pilotflame/bin/python install --quiet --no-compile --only-binary :all: \
        --require-hashes --requirement requirements.lock
COPY . .
RUN pip --python /opt/pilotflame/bin/python install --quiet --no-compile --no-deps --no-build-isolation .
# From the same lock, so that pods and workers run the same versions.
RUN pip --python /opt/pilotflame/bin/python uninstall --quiet --yes \
        aio_pika aiosqlite alembic apscheduler dramatiq hiredis kubernetes redis sqlalchemy sqlmodel
# Compiled now: the user of the container can't write here, and would compile everything at every start.
RUN python -m compileall -q --invalidation-mode unchecked-hash /opt/pilotflame/lib

FROM ${PYTHON_IMAGE}
# The same for the standard library, which is shipped uncompiled. Nothing is installed after this.
RUN python -m pip uninstall --quiet --yes --root-user-action=ignore pip \
    && python -m compileall -q --invalidation-mode unchecked-hash "$(python -c 'import os; print(os.path.dirname(os.__file__))')" \
    && groupadd --gid 10001 pilotflame \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin pilotflame
COPY --from=build /opt/pilotflame /opt/pilotflame
ENV PATH=/opt/pilotflame/bin:$PATH \
    PILOTFLAME_RUNNER_HOST=0.0.0.0 \
    PILOTFLAME_RUNNER_PORT=8080
WORKDIR /tmp
USER 10001:10001
EXPOSE 8080
# Checks the process only: if its gateway is unavailable, a restart would not help.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s --retries=3 \
    CMD ["sh", "-c", "exec python -S -c \"from urllib.request import urlopen; urlopen('http://$PILOTFLAME_RUNNER_HOST:$PILOTFLAME_RUNNER_PORT/healthz', timeout=4)\""]
ENTRYPOINT ["pilotflame"]
CMD ["runner"]
