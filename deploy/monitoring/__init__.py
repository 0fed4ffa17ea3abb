"""Alert rules for Prometheus and boards for Grafana, generated from the table of metrics."""
