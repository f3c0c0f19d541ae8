"""What a merged folder holds beside its weights: report, model card, side files."""
