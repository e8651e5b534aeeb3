"""The subcommands of ``sam3rt`` that need the build extra."""
