"""What imds-cli consists of: lines and replies, the prompt, and its ways to look at a server."""
