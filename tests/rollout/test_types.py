"""Groups and completions, and the metadata of those that another worker sampled."""

from rankup.rollout.types import Completion, PromptGroup

COMPLETION = Completion(token_ids=(5, 6, 7), logprobs=(-1.0,) * 3, text="abc", finish_reason="length", policy_version=4)
GROUP = PromptGroup(index=2, prompt_token_ids=(1, 2), completions=(COMPLETION,))


def test_metadata_has_the_length_and_no_tokens():
    metadata = GROUP.metadata()
    (completion,) = metadata.completions
    assert (metadata.index, metadata.prompt_token_ids) == (2, ())
    assert (completion.num_tokens, completion.finish_reason, completion.policy_version) == (3, "length", 4)
    assert (completion.token_ids, completion.logprobs, completion.text) == ((), (), "")


def test_metadata_keeps_the_types_of_the_fields():
    """Metadata once held a `range` in place of the tuple of token ids."""
    (completion,) = GROUP.metadata().completions
    assert isinstance(completion.token_ids, tuple)


def test_metadata_of_metadata_is_the_same():
    assert GROUP.metadata().metadata() == GROUP.metadata()
    assert COMPLETION.num_tokens == 3
