"""The command line. Importing it loads neither torch nor any runtime: commands import what they need when they run."""
