"""A Kubernetes API server in memory that refuses what the real one refuses, with controllers and a kubelet."""

from tests.cluster.fake_api.server import FakeApiServer, serve_fake_api

__all__ = ["FakeApiServer", "serve_fake_api"]
