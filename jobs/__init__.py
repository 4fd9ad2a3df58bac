"""One file a pipeline step, plus the lake, the cluster and the command line."""
