"""From a command line to a configuration: the only place that knows argparse, and where presets are."""
