"""Model files: the diffusers folder, the original single file, adapters, and the CLIP vocabulary that they share."""

# What diffusers calls the file of an adapter, and those of new words, one for each text encoder; ours has both in one.
ADAPTER_FILE = "pytorch_lora_weights.safetensors"
WORD_FILES = ("learned_embeds.safetensors", "learned_embeds_2.safetensors")
