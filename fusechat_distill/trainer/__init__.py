"""TRL's SFTTrainer with the fusion loss; usable without the rest."""
