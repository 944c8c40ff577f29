"""The command `rankup`: one file or folder for each subcommand."""
