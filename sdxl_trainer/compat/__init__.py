"""The command lines of the Hugging Face example scripts, run by our one training program."""
