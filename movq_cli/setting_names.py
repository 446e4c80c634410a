"""What the settings of movq are called in other projects, for the hint of an error about an unknown setting."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping

from movq_cli.errors import did_you_mean

ELSEWHERE: Mapping[str, tuple[str, ...]] = {
    # taming-transformers and latent-diffusion
    "base_lr": ("base_learning_rate",),
    "beta": ("commitment_weight", "codebook_weight"),
    "ch": ("channels",),
    "ch_mult": ("multipliers",),
    "attn_resolutions": ("attention_resolutions",),
    "codebook_weight": ("codebook_weight",),
    "blur_resample": ("discriminator_blur",),
    "diffaugment": ("discriminator_augmentation",),
    "disc_conditional": (),
    "disc_factor": ("adversarial_weight",),
    "disc_in_channels": (),
    "disc_ndf": ("discriminator_channels",),
    "disc_num_layers": ("discriminator_layers",),
    "disc_start": ("discriminator_start",),
    "disc_weight": ("adversarial_weight",),
    "n_embed": ("codebook_size",),
    "n_embd": ("width",),
    "n_layer": ("layers",),
    "n_head": ("heads",),
    "num_res_blocks": ("blocks",),
    "perceptual_weight": ("perceptual_weight",),
    "pixelloss_weight": ("l1_weight", "l2_weight"),
    "resid_pdrop": ("dropout",),
    "vocab_size": ("codebook_size",),
    # diffusers and LlamaGen
    "block_out_channels": ("channels", "multipliers"),
    "cfg": ("guidance",),
    "cfg_scale": ("guidance",),
    "class_dropout_prob": ("label_dropout",),
    "codebook_embed_dim": ("embed_dim",),
    "codebook_dim": ("embed_dim",),
    "codebook_l2_norm": ("normalize_codes",),
    "commit_loss_beta": ("commitment_weight",),
    "gradient_accumulation_steps": ("accumulate",),
    "gradient_checkpointing": ("activation_checkpointing",),
    "guidance_scale": ("guidance",),
    "image_size": ("resolution",),
    "layers_per_block": ("blocks",),
    "lecam_loss_weight": ("lecam_weight",),
    "lecam_regularization_weight": ("lecam_weight",),
    "lr_warmup_steps": ("warmup_steps",),
    "max_grad_norm": ("clip_norm",),
    "max_train_steps": ("steps",),
    "mixed_precision": ("precision",),
    "norm_num_groups": ("norm_groups",),
    "num_inference_steps": ("steps",),
    "num_train_epochs": ("epochs",),
    "num_vq_embeddings": ("codebook_size",),
    "train_batch_size": ("batch_size",),
    "vq_embed_dim": ("embed_dim",),
    # what people say
    "adv_weight": ("adversarial_weight",),
    "augmentation": ("flip", "crop"),
    "batch": ("batch_size",),
    "bs": ("batch_size",),
    "dim": ("width", "embed_dim"),
    "ema": ("ema_decay",),
    "ema_rate": ("ema_decay",),
    "gan_start": ("discriminator_start",),
    "gan_weight": ("adversarial_weight",),
    "grad_clip": ("clip_norm",),
    "gradient_clip": ("clip_norm",),
    "hflip": ("flip", "mirror"),
    "horizontal_flip": ("flip", "mirror"),
    "img_size": ("resolution",),
    "learning_rate": ("base_learning_rate",),
    "lpips_weight": ("perceptual_weight",),
    "lr": ("base_learning_rate",),
    "d_lr": ("discriminator_learning_rate",),
    "disc_lr": ("discriminator_learning_rate",),
    "lr_scheduler": ("decay",),
    "r1_gamma": ("r1_weight",),
    "r1_reg_weight": ("r1_weight",),
    "num_classes": ("classes",),
    "num_codes": ("codebook_size",),
    "num_epochs": ("epochs",),
    "num_heads": ("heads",),
    "num_layers": ("layers",),
    "num_steps": ("steps",),
    "num_workers": ("workers",),
    "size": ("resolution",),
    "use_ema": ("ema_decay",),
}
"""Name in another project to the names of ours, without sections; none if movq has no such setting."""

ABSENT: Mapping[str, str] = {
    "disc_conditional": "the discriminator sees images alone",
    "disc_in_channels": "images have three channels",
    "attn_pdrop": "attention weights are not dropped; dropout drops the outputs of attention and of the MLP",
    "embd_pdrop": "embeddings are not dropped; dropout drops the outputs of attention and of the MLP",
    "kl_weight": "the tokenizer has codes and no KL term",
    "optimizer": "stage 1 is trained by Adam and stage 2 by AdamW; their settings are betas and weight_decay",
    "remap": "all codes of the codebook can be used as they are",
    "resamp_with_conv": "downsampling and upsampling have convolutions always",
}
"""Settings of other projects that movq does not have, and why."""


def suggest(name: str, known: Collection[str]) -> str:
    """Return a hint about an unknown setting: ours of the same meaning, or of the same name, or of a similar one.

    Args:
        name: Name that the user typed, with or without a section.
        known: Valid names, with their sections.
    """
    name = name.lower().replace("-", "_")  # Nobody means another setting by another case.
    if name in known:
        return f"Did you mean {name!r}?"
    section, _, leaf = name.rpartition(".")
    if leaf in ABSENT:
        return f"movq does not have it: {ABSENT[leaf]}."
    ours = ELSEWHERE.get(leaf, ()) or (leaf,)
    candidates = [full for own in ours for full in known if full.rpartition(".")[2] == own]
    in_section = [full for full in candidates if full.rpartition(".")[0] == section]
    if candidates:
        # A name that is right in another section, or in another project, may also be a misspelt one of this section.
        similar = difflib.get_close_matches(name, known, 1, _CLOSE if leaf in ELSEWHERE else 0.6)
        meant = dict.fromkeys([*similar, *(in_section or candidates)])
        return f"Did you mean {' or '.join(map(repr, meant))}?"
    return did_you_mean(name, known)


_CLOSE = 0.95
"""Least similarity, by difflib, of a name of another project and a setting that may be meant as well."""
