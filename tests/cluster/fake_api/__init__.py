"""In-memory Kubernetes API server that refuses the same requests as the real one, with controllers and a
kubelet.
"""

from tests.cluster.fake_api.server import FakeApiServer, serve_fake_api

__all__ = ["FakeApiServer", "serve_fake_api"]
