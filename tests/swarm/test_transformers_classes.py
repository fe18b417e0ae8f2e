"""The classes that are shaped as transformers' own give what transformers gives, in one process."""

import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import petals
import pytest
import torch
from petals import (
    AutoDistributedConfig,
    AutoDistributedModel,
    AutoDistributedModelForCausalLM,
    RemoteSequential,
)
from support.processes import ProcessSwarm, swarm
from support.reference import ReferenceModel, demo_model
from support.tiny_families import tiny_config, tiny_model
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

README = Path(__file__).parents[2] / "README.md"
SPANS = ("0:3", "3:5", "5:8")
PROMPT = "In the beginning God created"
PROMPTS = ("And God said", "x", "Then went the king of the north out against the city, and")


@pytest.fixture(scope="module")
def served(
    demo: ReferenceModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ProcessSwarm]:
    with swarm(tmp_path_factory.mktemp("swarm")) as processes:
        processes.serve(demo.name, *SPANS, options=["--dtype", "float32"])
        yield processes


@pytest.fixture(scope="module")
def model(served: ProcessSwarm) -> Iterator[Any]:
    model = AutoDistributedModelForCausalLM.from_pretrained(
        "demo", initial_peers=[served.address], torch_dtype=torch.float32
    )
    yield model
    model.close()


@pytest.fixture
def ids(demo: ReferenceModel) -> torch.Tensor:
    tokens: torch.Tensor = demo.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    return tokens


def same(model: Any, demo: ReferenceModel, *arguments: Any, **options: Any) -> torch.Tensor:
    """What both models generate, which is the same; randomness begins alike."""
    torch.manual_seed(7)
    expected: torch.Tensor = demo.model.generate(*arguments, **options)
    torch.manual_seed(7)
    ours = model.generate(*arguments, **options)
    assert ours.tolist() == expected.tolist()
    return expected


def entering(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """What goes into the first block."""
    transformer = model.transformer
    hidden: torch.Tensor = transformer.word_embeddings_layernorm(transformer.word_embeddings(ids))
    return hidden


def test_greedy(model: Any, demo: ReferenceModel, ids: torch.Tensor) -> None:
    text = same(model, demo, ids, max_new_tokens=24)
    assert text.shape == (1, ids.shape[1] + 24)


def test_beam_search(model: Any, demo: ReferenceModel, ids: torch.Tensor) -> None:
    best = same(model, demo, ids, max_new_tokens=24, num_beams=3)
    assert best.tolist() != same(model, demo, ids, max_new_tokens=24).tolist()


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_hop_lost_during_beam_search(
    place: int, demo: ReferenceModel, ids: torch.Tensor, served: ProcessSwarm, model: Any
) -> None:
    """Whichever it is: what others hold, in the order of the beams, goes to the one that replaces it."""
    [spare] = served.serve(demo.name, SPANS[place], options=["--dtype", "float32"])

    class Killer(LogitsProcessor):
        steps = 0

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self.steps += 1
            if self.steps == 10:
                served.node(session.route[place].peer_id).send_signal(signal.SIGKILL)
            return scores

    expected = demo.model.generate(ids, max_new_tokens=24, num_beams=4)
    with model.inference_session(max_length=60) as session:
        ours = model.generate(
            ids, max_new_tokens=24, num_beams=4, logits_processor=LogitsProcessorList([Killer()])
        )
        assert session.recoveries == 1
    assert ours.tolist() == expected.tolist()
    assert [node.running for node in served.nodes].count(True) == len(SPANS), spare.errors


def test_several_of_the_best_beams_of_several_prompts(model: Any, demo: ReferenceModel) -> None:
    batch = demo.tokenizer(list(PROMPTS), return_tensors="pt", padding=True)
    same(model, demo, **batch, max_new_tokens=12, num_beams=4, num_return_sequences=2)


def test_seeded_sampling(model: Any, demo: ReferenceModel, ids: torch.Tensor) -> None:
    sampled = {"do_sample": True, "temperature": 0.9, "top_p": 0.95, "top_k": 50}
    same(model, demo, ids, max_new_tokens=24, **sampled)
    same(model, demo, ids, max_new_tokens=12, num_beams=3, **sampled)
    same(model, demo, ids, max_new_tokens=12, num_return_sequences=3, **sampled)


def test_a_batch_with_left_padding(model: Any, demo: ReferenceModel) -> None:
    batch = demo.tokenizer(list(PROMPTS), return_tensors="pt", padding=True)
    assert bool((batch["attention_mask"] == 0).any())
    same(model, demo, **batch, max_new_tokens=16, repetition_penalty=1.3)


def test_prompt_lookup(model: Any, demo: ReferenceModel, ids: torch.Tensor) -> None:
    """Drafts that are refused are rolled back."""
    same(model, demo, ids, max_new_tokens=24, prompt_lookup_num_tokens=3)


def test_without_a_cache(model: Any, demo: ReferenceModel, ids: torch.Tensor) -> None:
    same(model, demo, ids, max_new_tokens=3, use_cache=False)


class Odd(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, ::2] = -torch.inf
        return scores


def test_processors_criteria_and_streamers(
    model: Any, demo: ReferenceModel, ids: torch.Tensor
) -> None:
    length = ids.shape[1] + 7
    text = same(
        model,
        demo,
        ids,
        max_new_tokens=20,
        logits_processor=LogitsProcessorList([Odd()]),
        stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(length)]),
    )
    assert text.shape[1] == length
    assert all(token % 2 for token in text[0, ids.shape[1] :].tolist())
    streamer = TextIteratorStreamer(demo.tokenizer, skip_prompt=True)
    model.generate(ids, max_new_tokens=7, streamer=streamer)
    [written] = demo.tokenizer.batch_decode(
        demo.model.generate(ids, max_new_tokens=7)[:, ids.shape[1] :]
    )
    assert "".join(streamer) == written


def test_a_prompt_of_embeddings(model: Any, demo: ReferenceModel, ids: torch.Tensor) -> None:
    embeddings = demo.model.get_input_embeddings()(ids).detach()
    torch.testing.assert_close(model.get_input_embeddings()(ids), embeddings)
    same(model, demo, inputs_embeds=embeddings, max_new_tokens=12)
    same(model, demo, inputs_embeds=embeddings, max_new_tokens=12, num_beams=3)
    with torch.no_grad():
        expected = demo.model(inputs_embeds=embeddings).logits
        torch.testing.assert_close(
            model(inputs_embeds=embeddings).logits, expected, rtol=1e-4, atol=1e-4
        )


def test_a_session_over_several_calls(model: Any, demo: ReferenceModel, ids: torch.Tensor) -> None:
    whole = demo.model.generate(ids, max_new_tokens=12)
    more = demo.tokenizer(" And it was so.", return_tensors="pt")["input_ids"]
    with model.inference_session(max_length=100) as session:
        first = model.generate(ids, max_new_tokens=5)
        second = model.generate(None, max_new_tokens=7, session=session)
        assert torch.cat([first, second], dim=1).tolist() == whole.tolist()
        assert session.position == whole.shape[1] - 1
        third = model.generate(more, max_new_tokens=6)
        text = torch.cat([whole, more], dim=1)
        expected = demo.model.generate(text, max_new_tokens=6)
        assert third.tolist() == expected[:, whole.shape[1] :].tolist()
        beams = model.generate(max_new_tokens=8, num_beams=3)
        best = demo.model.generate(expected, max_new_tokens=8, num_beams=3)
        assert beams.tolist() == best[:, expected.shape[1] :].tolist()
        again = model.generate(max_new_tokens=8, num_beams=3)
        best_again = demo.model.generate(best, max_new_tokens=8, num_beams=3)
        assert again.tolist() == best_again[:, best.shape[1] :].tolist()
        session.position = whole.shape[1]
        rolled_back = model.generate(max_new_tokens=4)
        assert (
            rolled_back.tolist()
            == demo.model.generate(whole, max_new_tokens=4)[:, whole.shape[1] :].tolist()
        )


def test_a_session_of_a_padded_batch(model: Any, demo: ReferenceModel) -> None:
    batch = demo.tokenizer(list(PROMPTS), return_tensors="pt", padding=True)
    whole = demo.model.generate(**batch, max_new_tokens=9)
    with model.inference_session(max_length=60) as session:
        first = model.generate(**batch, max_new_tokens=4)
        second = model.generate(max_new_tokens=5)
        assert torch.cat([first, second], dim=1).tolist() == whole.tolist()
        assert session.padding == tuple((batch["attention_mask"] == 0).sum(dim=1).tolist())


def test_logits_loss_and_hidden_states(model: Any, demo: ReferenceModel, ids: torch.Tensor) -> None:
    with torch.no_grad():
        expected = demo.model(ids, labels=ids, output_hidden_states=True)
        ours = model(ids, labels=ids, output_hidden_states=True)
        last = model(ids, logits_to_keep=1, return_dict=False)
    torch.testing.assert_close(ours.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.loss, expected.loss, rtol=1e-4, atol=1e-4)
    assert len(ours.hidden_states) == len(expected.hidden_states) == demo.num_blocks + 1
    for mine, theirs in zip(ours.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last[0], expected.logits[:, -1:], rtol=1e-4, atol=1e-4)


def test_a_padded_batch_of_logits(model: Any, demo: ReferenceModel) -> None:
    batch = demo.tokenizer(list(PROMPTS), return_tensors="pt", padding=True)
    with torch.inference_mode():
        expected, ours = demo.model(**batch).logits, model(**batch).logits
    torch.testing.assert_close(ours[:, -1], expected[:, -1], rtol=1e-4, atol=1e-4)


def test_blocks_step_by_step(model: Any, demo: ReferenceModel, ids: torch.Tensor) -> None:
    """Petals' own way of looking inside: embeddings in, hidden states out, head applied by hand."""
    transformer = model.transformer
    with torch.inference_mode():
        expected = demo.model(ids, output_hidden_states=True)
    embeddings = entering(model, ids)
    with transformer.h.inference_session(max_length=20) as session:
        outputs = [session.step(embeddings[:, :0])]
        outputs += [session.step(embeddings[:, at : at + 1]) for at in range(4)]
        outputs.append(session.step(embeddings[:, 4:]))
        assert session.position == ids.shape[1]
        hidden = torch.cat(outputs, dim=1)
        session.position = 2
        torch.testing.assert_close(
            session.step(embeddings[:, 2:3]), hidden[:, 2:3], rtol=1e-4, atol=1e-4
        )
    logits = model.lm_head(transformer.ln_f(hidden))
    torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(transformer.h(embeddings), hidden, rtol=1e-4, atol=1e-4)


def test_slices_of_the_blocks(
    model: Any, demo: ReferenceModel, served: ProcessSwarm, ids: torch.Tensor
) -> None:
    with torch.inference_mode():
        states = demo.model(ids, output_hidden_states=True).hidden_states
    blocks = model.transformer.h
    assert len(blocks) == demo.num_blocks
    assert [str(block.span) for block in blocks] == [f"{n}:{n + 1}" for n in range(len(blocks))]
    for part, start, stop in ((blocks[2:6], 2, 6), (blocks[4], 4, 5), (blocks[-4:-1][1:], 5, 7)):
        with torch.no_grad():
            torch.testing.assert_close(part(states[start]), states[stop], rtol=1e-4, atol=1e-4)
    config = AutoDistributedConfig.from_pretrained("demo", initial_peers=[served.address])
    own = RemoteSequential(config, start_block=1, end_block=4)
    torch.testing.assert_close(own(states[1]), states[4], rtol=1e-4, atol=1e-4)
    own.swarm.close()
    with pytest.raises(petals.PetalsError, match="disconnected"):
        own(states[1])


def test_beams_by_hand(model: Any, demo: ReferenceModel) -> None:
    """``hypo_ids``: each sequence goes on from what another was."""
    batch = demo.tokenizer(["And God said", "The king and"], return_tensors="pt")["input_ids"]
    embeddings = entering(model, batch)
    with model.inference_session(max_length=20) as session:
        first = session.step(embeddings[:, :2])
        session.step(embeddings[:, 2:], hypo_ids=torch.tensor([1, 1]))
        session.position = 2
        again = session.step(embeddings[:, 2:], hypo_ids=[0, 1])
    swapped = torch.stack([torch.cat([batch[1, :2], row[2:]]) for row in batch])
    with torch.inference_mode():
        hidden = model.transformer.h(entering(model, swapped))
    torch.testing.assert_close(again, hidden[:, 2:], rtol=1e-4, atol=1e-4)
    assert first.shape == (2, 2, demo.model.config.hidden_size)


def test_the_model_without_its_head(
    model: Any, demo: ReferenceModel, served: ProcessSwarm, ids: torch.Tensor
) -> None:
    config = AutoDistributedConfig.from_pretrained("demo", initial_peers=[served.address])
    assert (config.num_hidden_layers, config.initial_peers) == (8, [served.address])
    bare = AutoDistributedModel.from_pretrained("demo", config=config, dtype="float32")
    with torch.inference_mode():
        ours = bare(ids, output_hidden_states=True)
        expected = demo.model.transformer(ids)
    torch.testing.assert_close(
        ours.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(ours.hidden_states[-1], ours.last_hidden_state)
    bare.close()


def test_what_cannot_be_is_said(model: Any, demo: ReferenceModel, ids: torch.Tensor) -> None:
    batch = demo.tokenizer(list(PROMPTS), return_tensors="pt", padding=True)
    embeddings = model.get_input_embeddings()(ids)
    with pytest.raises(petals.PetalsError, match="no gradients flow through the swarm"):
        model(inputs_embeds=embeddings.clone().requires_grad_())
    with pytest.raises(petals.PetalsError, match="no gradients flow through the swarm"):
        model(ids, labels=ids).loss.backward()
    with pytest.raises(petals.PetalsError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(petals.PetalsError, match="only padding on the left"):
        model(batch["input_ids"], attention_mask=batch["attention_mask"].flip(1))
    with pytest.raises(petals.PetalsError, match="attention weights do not leave the hops"):
        model(ids, output_attentions=True)
    with pytest.raises(petals.PetalsError, match="does not name blocks that follow one another"):
        model.transformer.h[::2]
    with pytest.raises(petals.PetalsError, match="neither a field of this model's config"):
        AutoDistributedConfig.from_pretrained("demo", initial_peer=["/ip4/127.0.0.1"])
    with pytest.warns(UserWarning, match="max_retries: nothing to set here"):
        AutoDistributedConfig.from_pretrained("demo", max_retries=3)
    with pytest.raises(petals.PetalsError, match="no way into a swarm"):
        AutoDistributedModel.from_pretrained("demo", initial_peers=[])
    with model.inference_session(max_length=ids.shape[1]) as session:
        session.step(embeddings)
        with pytest.raises(petals.PetalsError, match="do not fit this session"):
            session.step(embeddings)
        with pytest.raises(petals.PetalsError, match="cannot take the places"):
            session.step(embeddings[:, :0], hypo_ids=[1])
        with pytest.raises(petals.PetalsError, match="trained prompts are not offered"):
            session.step(embeddings, prompts=embeddings)
        with pytest.raises(petals.PetalsError, match="steps of hidden states"):
            model.generate(ids, max_new_tokens=1)
        with pytest.raises(petals.PetalsError, match="is not among 0 to"):
            session.position = 99
    with pytest.raises(petals.PetalsError, match="the session is closed"):
        session.step(embeddings)
    too_long = demo.max_length + 1
    with pytest.raises(petals.PetalsError, match=f"{too_long} tokens .* are more than demo"):
        model.inference_session(max_length=too_long).step(embeddings)


def test_the_code_in_the_readme(
    demo: ReferenceModel, served: ProcessSwarm, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    [code] = [block for block in blocks if "AutoDistributedModelForCausalLM" in block]
    scope: dict[str, Any] = {}
    exec(code.replace("/ip4/…/tcp/…/p2p/…", served.address), scope)
    scope["model"].close()
    prompt = demo.tokenizer("In the beginning", return_tensors="pt")["input_ids"]
    best = demo.model.generate(prompt, max_new_tokens=20, num_beams=3)
    likeliest = demo.model.generate(prompt, max_new_tokens=20)
    written = [demo.tokenizer.decode(text[0]) for text in (best, likeliest)]
    assert capsys.readouterr().out.splitlines() == "\n".join(written).splitlines()
    with torch.inference_mode():
        states = demo.model(prompt, output_hidden_states=True).hidden_states
    torch.testing.assert_close(scope["embeddings"], states[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scope["hidden"], states[4], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["Gemma, wide heads", "Falcon, new architecture"])
def test_other_families(
    name: str, tmp_path_factory: pytest.TempPathFactory, tmp_swarm: ProcessSwarm
) -> None:
    """One that is carried by the adapter, and one with a file of its own."""
    folder = tmp_path_factory.mktemp("model")
    reference = tiny_model(tiny_config(name), folder)
    demo = demo_model()
    for part in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo.folder / part, folder / part)
    tmp_swarm.serve(folder, "0:2", f"2:{reference.config.num_hidden_layers}")
    model: Any = AutoDistributedModelForCausalLM.from_pretrained(
        str(folder), initial_peers=[tmp_swarm.address], dtype="float32"
    )
    ids = torch.tensor([[5, 17, 40, 3], [0, 0, 8, 9]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    options = {"attention_mask": mask, "max_new_tokens": 10, "pad_token_id": 0}
    for beams in (1, 3):
        expected = reference.generate(ids, num_beams=beams, **options)
        assert model.generate(ids, num_beams=beams, **options).tolist() == expected.tolist()
    with torch.inference_mode():
        embeddings = reference.get_input_embeddings()(ids[:1])
        theirs = reference(inputs_embeds=embeddings, output_hidden_states=True)
        ours = model(inputs_embeds=embeddings, output_hidden_states=True)
        for mine, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
        transformer = model.transformer
        normed = transformer.ln_f(transformer.h(theirs.hidden_states[0]))
        torch.testing.assert_close(model.lm_head(normed), theirs.logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(transformer.word_embeddings(ids[:1]), embeddings)
    model.close()
