"""Models from the Hugging Face Hub, and converted files to it; the only folder that imports huggingface_hub."""
