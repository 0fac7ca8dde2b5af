"""What pooled_attention and attention_with_scores share: attention of strided rows on each backend."""
