"""Images, Kubernetes manifests, and the tools of a release."""
