"""What a workflow is and how it runs: plain Python that knows no database, queue or web server."""
