"""Names of settings that several stages depend on, in groups."""

# What decides how texts become token ids, besides the model's tokenizer and template.
TEMPLATE = ("text.template", "text.date", "text.special_tokens")
# What decides how log-probabilities and rewards are computed.
SCORING = (
    *("training.row_length", "training.rows", "training.logprob_chunk"),
    *("training.parameter_dtype", "compute.dtype", "lora.base"),
)
ANSWERS = ("rollout.max_new_tokens", "rollout.max_prompt_tokens")
