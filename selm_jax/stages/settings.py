"""Groups of settings that several stages depend on."""

# What texts become token ids with, besides the tokenizer and the template of the model.
TEMPLATE = ("text.template", "text.date", "text.special_tokens")
# How log-probabilities and rewards are computed.
SCORING = (
    *("training.row_length", "training.rows", "training.logprob_chunk"),
    *("training.parameter_dtype", "compute.dtype", "lora.base"),
)
ANSWERS = ("rollout.max_new_tokens", "rollout.max_prompt_tokens")
