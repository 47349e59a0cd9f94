"""Compare perplexity from a compressed cache with plain forward passes that mask the evicted entries."""

from __future__ import annotations

import json
import math

import pyarrow.parquet as pq
import pytest
import torch
from models import FAMILIES, engine, random_model, reference, sliding_model, tokens
from torch.nn.functional import cross_entropy

from kv_transition import settings, specs
from kv_transition.budget import Budget
from kv_transition.cache.state import same
from kv_transition.cache.store import PrefillStore
from kv_transition.engines import local
from kv_transition.engines.local import LocalEngine
from kv_transition.errors import UserError
from kv_transition.policies.catalog import create
from kv_transition.provenance import read_metadata
from kv_transition.run.decode import Setting
from kv_transition.studies.perplexity import run as job
from kv_transition.studies.perplexity import specs as perplexity_specs
from kv_transition.studies.perplexity import windows as windows_job
from kv_transition.studies.perplexity.run import score, stream

N, FED, K = 40, 24, 16
CAUSAL = torch.ones(N + FED, N + FED, dtype=torch.bool).tril()

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def setting(kind: str, budget: str = "t16", **hyper_parameters) -> Setting:
    return Setting(create(kind, hyper_parameters), Budget.parse(budget), "before_question")


def nats_of(logits: torch.Tensor, ids: list[int], first: int) -> torch.Tensor:
    """Return -log p of the tokens from ``first + 1`` on, from logits [T, V] of all tokens but the last."""
    return cross_entropy(logits[first:], torch.tensor(ids[first + 1 :]), reduction="none")


def compressed(reader: LocalEngine, ids: list[int], chosen: Setting, seed: int = 0):
    return chosen.compress(reader.extend(None, ids[:N], chosen.policy.statistics), K, seed)


class TestTheEngine:
    """Tests of `LocalEngine.score`, which reads tokens and returns the negative log-likelihood of each next token."""

    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_loss_is_that_of_a_plain_forward_pass(self, family):
        ids = tokens(331)
        plain = random_model(family)
        labels = torch.tensor([[-100] * 21 + ids[21:]])
        with torch.no_grad():
            loss = plain(input_ids=torch.tensor([ids]), labels=labels).loss
        state = engine(family).extend(None, ids[:20])
        _, nats = engine(family).score(state, ids[20:-1], ids[21:])
        assert nats.shape == (310,)
        assert float(nats.double().mean()) == pytest.approx(float(loss), abs=1e-5)

    def test_a_sliding_window_model_as_well(self):
        reader, plain = sliding_model()
        ids = tokens(90)
        with torch.no_grad():
            logits = plain(input_ids=torch.tensor([ids[:-1]])).logits[0].float()
        _, nats = reader.score(reader.extend(None, ids[:30]), ids[30:-1], ids[31:])
        torch.testing.assert_close(nats, nats_of(logits, ids, 30), **CLOSE)

    def test_the_state_is_that_of_extend(self):
        reader, ids = engine("llama"), tokens(50)
        context = reader.extend(None, ids[:20])
        after, _ = reader.score(context, ids[20:-1], ids[21:])
        assert same(after, reader.extend(context, ids[20:-1]), atol=1e-5)
        assert same(context, reader.extend(None, ids[:20]))

    @pytest.mark.parametrize("chunk", [None, 5])
    def test_no_more_logits_at_once_than_allowed_and_the_same_nats(self, monkeypatch, chunk):
        reader, ids = LocalEngine(engine("llama").model, chunk_tokens=chunk), tokens(60)
        _, whole = reader.score(None, ids[:-1], ids[1:])
        monkeypatch.setattr(local, "_SCORED", 7)
        held = []
        hook = reader.model.register_forward_hook(lambda *call: held.append(call[-1].logits.shape[1]))
        after, nats = reader.score(None, ids[:-1], ids[1:])
        hook.remove()
        assert max(held) == min(7, chunk or 7)
        assert sum(held) == 59
        torch.testing.assert_close(nats, whole, **CLOSE)
        # only the last token's logits stay in memory
        assert after.logits.untyped_storage().nbytes() == after.logits.nbytes

    def test_a_batch_scores_as_its_sequences_do(self):
        from kv_transition.cache.batch import stack

        reader, texts = engine("mistral"), [tokens(40, seed) for seed in (1, 2)]
        states = [reader.extend(None, ids[:20]) for ids in texts]
        alone = [reader.score(s, ids[20:-1], ids[21:])[1] for s, ids in zip(states, texts, strict=True)]
        batch = stack(states, frozenset())
        _, nats = reader.score(batch, [i[20:-1] for i in texts], [i[21:] for i in texts], frozenset())
        torch.testing.assert_close(nats, torch.stack(alone), **CLOSE)


def visible_after(reader: LocalEngine, state) -> list[torch.Tensor]:
    """Return masks in which the context is read in full and later tokens see only the entries that the state holds."""
    masks = []
    for layer in state.layers:
        mask = CAUSAL.expand(2, -1, -1).clone()
        held = torch.zeros(2, N, dtype=torch.bool)
        first = 0
        for part in layer.parts:
            heads = part.positions.shape[0]
            held[first : first + heads].scatter_(1, part.positions, True)
            first += heads
        mask[:, N:, :N] = held[:, None]
        masks.append(mask)
    return masks


class TestEvictionIsMasking:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("kind", ["full", "random", "knorm", "snapkv", "adakv", "pyramidkv", "entropy_drop"])
    def test_of_a_policy_that_compresses_once(self, family, kind):
        reader, ids = engine(family), tokens(N + FED + 1)
        chosen = setting(kind, "r1" if kind == "full" else "t16")
        state = compressed(reader, ids, chosen, seed=3)
        logits, _ = reference(family, ids[:-1], visible_after(reader, state))
        got = score(reader, state, ids[N:], chosen, K)
        torch.testing.assert_close(got.nats, nats_of(logits, ids, N), **CLOSE)
        # tokens that are scored are not evicted
        assert list(got.kept) == [state.entries + 1 + i for i in range(FED)]
        assert got.state.entries == got.kept[-1]

    @pytest.mark.parametrize("family", FAMILIES)
    def test_of_streaming_llm_after_every_token(self, family):
        reader, ids = engine(family), tokens(N + FED + 1)
        chosen = setting("streaming_llm")
        got = score(reader, compressed(reader, ids, chosen), ids[N:], chosen, K)
        logits, _ = reference(family, ids[:-1], [sinks_and_recent(first=N)] * 3)
        torch.testing.assert_close(got.nats, nats_of(logits, ids, N), **CLOSE)
        assert set(got.kept) == {K}
        assert got.state.layers[0].positions[0].tolist() == [0, 1, 2, 3, *range(N + FED - 12, N + FED)]

    def test_of_h2o_after_every_token(self):
        """Compare with the definition: after each token the 8 newest and the 8 other entries with the largest sums
        remain."""
        reader, ids = engine("llama"), tokens(N + FED + 1)
        chosen = setting("h2o")
        got = score(reader, compressed(reader, ids, chosen), ids[N:], chosen, K)

        seen = [CAUSAL.expand(2, -1, -1).clone() for _ in range(3)]
        for length in range(N, N + FED):
            _, captured = reference("llama", ids[:length], [mask[:, :length, :length] for mask in seen])
            for (weights, *_), mask in zip(captured, seen, strict=True):
                sums = weights.sum(1).view(2, 2, length).mean(1)
                # the entries that the last token attended to, and the token itself
                held = mask[:, length - 1, :length]
                for head in range(2):
                    there = held[head].nonzero().flatten().tolist() if length > N else list(range(length))
                    rest = sorted((j for j in there if j < length - 8), key=lambda j: (-float(sums[head, j]), j))
                    stays = rest[:8] + [j for j in there if j >= length - 8]
                    mask[head, length, :length] = False
                    mask[head, length, stays] = True
        logits, _ = reference("llama", ids[:-1], seen)
        torch.testing.assert_close(got.nats, nats_of(logits, ids, N), **CLOSE)
        assert set(got.kept) == {K}


def sinks_and_recent(first: int, chunk: int = 1) -> torch.Tensor:
    """Return masks [2, T, T] of a stream with 4 sinks and 12 recent tokens, read in chunks from row ``first`` on.

    A row sees the sinks, the 12 tokens before its chunk, and the tokens of its chunk up to itself.
    """
    mask = CAUSAL.clone()
    for row in range(first, N + FED):
        begin = row - (row - first) % chunk if row < N else row
        mask[row, 4 : max(begin - 12, 4)] = False
    return mask.expand(2, -1, -1)


class TestStreaming:
    @pytest.mark.parametrize("chunk", [1, 5, 16])
    def test_the_context_is_read_with_what_is_left(self, chunk):
        """Check that only the tokens of the first chunk see all tokens before them."""
        reader, ids = engine("llama"), tokens(N + FED + 1)
        chosen = setting("streaming_llm")
        own = stream(reader, ids[:N], chosen, K, chunk)
        assert own.state.entries == K
        got = score(reader, own.state, ids[N:], chosen, K)
        logits, _ = reference("llama", ids[:-1], [sinks_and_recent(first=0, chunk=chunk)] * 3)
        torch.testing.assert_close(got.nats, nats_of(logits, ids, N), **CLOSE)

    def test_it_differs_from_reading_in_full(self):
        reader, ids = engine("llama"), tokens(N + FED + 1)
        chosen = setting("streaming_llm")
        streamed = score(reader, stream(reader, ids[:N], chosen, K, 1).state, ids[N:], chosen, K)
        read = score(reader, compressed(reader, ids, chosen), ids[N:], chosen, K)
        assert not torch.allclose(streamed.nats, read.nats, atol=1e-3)

    def test_nothing_is_evicted_as_long_as_it_fits(self):
        reader, ids = engine("llama"), tokens(N + FED + 1)
        chosen = setting("h2o", f"t{N}")
        own = stream(reader, ids[:N], chosen, N, 1)
        assert same(own.state, reader.extend(None, ids[:N], chosen.policy.statistics), atol=1e-4)
        assert own.token_bytes == own.state.nbytes / N

    def test_positions_in_the_cache_stay_below_twice_its_size(self):
        """Check positions in a long stream; texts may be longer than those that the model was trained on."""
        reader, ids = engine("llama"), tokens(200)
        chosen = setting("streaming_llm", positions="cache", n_sink=0)
        state = stream(reader, ids, chosen, K, 1).state
        assert state.length == 200
        assert max(float(layer.angles.max()) for layer in state.layers) < 2 * K


class TestBlocks:
    @pytest.mark.parametrize("kind", ["full", "snapkv", "adakv", "entropy_merge", "expected_attention"])
    def test_a_block_scores_as_its_tokens_one_by_one(self, kind):
        reader, ids = engine("qwen2"), tokens(N + FED + 1)
        chosen = setting(kind, "r1" if kind == "full" else "t16")
        state = compressed(reader, ids, chosen)
        block = score(reader, state, ids[N:], chosen, K)
        nats = []
        for token, target in zip(ids[N:-1], ids[N + 1 :], strict=True):
            state = reader.extend(state, [token], frozenset())
            nats.append(-float(state.logits.double().log_softmax(-1)[target]))
        torch.testing.assert_close(block.nats.double(), torch.tensor(nats, dtype=torch.float64), **CLOSE)

    @pytest.mark.parametrize("kind", ["h2o", "h2o_heavy", "tova", "streaming_llm"])
    def test_policies_that_act_each_step_do_not(self, kind):
        """Check that they evict while scoring: on an unchanged cache the losses are different."""
        reader, ids = engine("qwen2"), tokens(N + FED + 1)
        chosen = setting(kind)
        state = compressed(reader, ids, chosen)
        acting = score(reader, state, ids[N:], chosen, K)
        _, resting = reader.score(state, ids[N:-1], ids[N + 1 :], frozenset())
        assert torch.allclose(acting.nats[0], resting[0], **CLOSE)
        assert not torch.allclose(acting.nats, resting, atol=1e-3)

    def test_the_prompts_entropy_decides_the_first_recall(self):
        """Check that entropy_recall decides before each token: with "always" it recalls at every token, with "never" at
        none."""
        reader, ids = engine("qwen2"), tokens(N + FED + 1)
        records = {}
        for moments in ("always", "never"):
            chosen = setting("entropy_recall", moments=moments)
            got = score(reader, compressed(reader, ids, chosen), ids[N:], chosen, K, seed=1)
            records[moments] = got.record
            assert set(got.kept) == {K}
        assert records["always"]["moments"] == list(range(FED))
        assert records["never"]["triggers"] == 0

    def test_quantized_caches_keep_all_and_pack_what_comes(self):
        reader, ids = engine("qwen2"), tokens(N + FED + 1)
        chosen = setting("quantized", "r1", bits=4)
        full = reader.extend(None, ids[:N])
        state = chosen.compress(full, N)
        got = score(reader, state, ids[N:], chosen, N)
        assert got.state.entries == N + FED
        assert got.state.nbytes / (N + FED) == pytest.approx(state.nbytes / N)
        assert got.state.nbytes < full.nbytes


SPEC = {
    "policy": "h2o",
    "kind": "h2o",
    "hyper_parameters": {},
    "budget": "r0.4",
    "streaming": False,
    "streaming_chunk": 1,
    "seed": 0,
}


def window(number: int = 0, context: int = N) -> dict:
    ids = tokens(context + FED + 1, seed=number)
    return {
        "corpus": "text",
        "book_id": "b",
        "window": number,
        "bin": 0,
        "context_start": 0,
        "context_tokens": context,
        "prompt_sha256": f"{number}",
        "context_ids": ids[:context],
        "target_ids": ids[context:],
    }


class TestRows:
    @pytest.fixture
    def store(self, tmp_path):
        return PrefillStore(tmp_path / "store", "never")

    def test_bytes_are_matched_between_policies_that_act_each_step_and_others(self, store):
        shares = {}
        for match in ("mean", "none"):
            for kind in ("h2o", "streaming_llm", "snapkv", "random"):
                spec = SPEC | {"kind": kind, "budget": "r0.5", "match": match}
                (row,) = job.rows(engine("llama"), [window(context=200)], spec, store)
                shares[match, kind] = row["kept_mean"] / row["full_mean"]
        matched = [share for (match, _), share in shares.items() if match == "mean"]
        assert matched == pytest.approx([0.5] * 4, rel=0.01)
        assert shares["none", "snapkv"] > 1.05 * shares["none", "h2o"]

    def test_what_a_row_says(self, store):
        reader = engine("llama")
        (row,) = job.rows(reader, [window()], SPEC, store)
        per_token = 3 * 2 * 2 * 8 * 4  # layers, KV heads, keys and values, channels, bytes
        assert row["budget_entries"] == math.ceil(0.4 * N) == K
        assert row["n_tokens"] == FED
        assert (row["kept_final"], row["kept_mean"]) == (K, K)
        assert row["bytes_before"] == N * per_token
        assert row["bytes_after"] == row["cache_bytes"] == row["total_bytes"] == K * per_token
        assert row["full_bytes"] == (N + FED) * per_token
        chosen, ids = setting("h2o"), window()["context_ids"] + window()["target_ids"]
        nats = score(reader, compressed(reader, ids, chosen), ids[N:], chosen, K).nats
        assert row["nll_sum"] == pytest.approx(float(nats.sum()), rel=1e-6)
        assert row["error"] is None

    def test_streaming_reads_with_the_policy_and_says_what_a_full_cache_takes(self, store):
        reader, chosen = engine("llama"), setting("h2o")
        (row,) = job.rows(reader, [window()], SPEC | {"streaming": True, "streaming_chunk": 4}, store)
        ids = window()["context_ids"] + window()["target_ids"]
        own = stream(reader, ids[:N], chosen, K, 4).state
        assert row["nll_sum"] == pytest.approx(float(score(reader, own, ids[N:], chosen, K).nats.sum()), rel=1e-6)
        assert row["full_bytes"] == (N + FED) * 3 * 2 * 2 * 8 * 4
        (full,) = job.rows(reader, [window()], FULL | {"streaming": True}, store)
        assert full["nll_sum"] == job.rows(reader, [window()], FULL, store)[0]["nll_sum"]

    def test_seeds_differ_by_window_and_repeat(self, store):
        spec = SPEC | {"policy": "random", "kind": "random"}
        first, again = (job.rows(engine("llama"), [window(0), window(1)], spec, store) for _ in range(2))
        assert [row["nll_sum"] for row in first] == [row["nll_sum"] for row in again]
        other = job.rows(engine("llama"), [window(0)], spec | {"seed": 1}, store)
        assert other[0]["nll_sum"] != first[0]["nll_sum"]

    def test_a_window_that_does_not_fit_is_a_row(self, store, monkeypatch, capsys):
        real = job.measured

        def failing(reader, own, *rest):
            if own["window"] == 1:
                raise torch.OutOfMemoryError("no 2 GiB left\nand more")
            return real(reader, own, *rest)

        def all_at_once(*_):
            raise torch.OutOfMemoryError

        monkeypatch.setattr(job, "measured", failing)
        monkeypatch.setattr(job, "together", all_at_once)
        rows = job.rows(engine("llama"), [window(i) for i in range(3)], SPEC, store)
        assert [row.get("error") for row in rows] == [None, "OOM: no 2 GiB left", None]
        assert rows[1]["window"] == 1
        assert "nll_sum" not in rows[1]
        told = capsys.readouterr().err.splitlines()
        expected = math.exp(sum(rows[i]["nll_sum"] for i in (0, 2)) / (2 * FED))
        assert told[-1] == f"scored 3 of 3 windows, perplexity {expected:.4g}"

    @pytest.mark.parametrize("options", [{}, {"streaming": True, "streaming_chunk": 4}])
    @pytest.mark.parametrize(
        ("kind", "hyper_parameters"),
        [("h2o", {}), ("tova", {}), ("streaming_llm", {}), ("streaming_llm", {"positions": "cache"})],
    )
    def test_windows_scored_together_come_to_what_each_comes_to_alone(self, store, kind, hyper_parameters, options):
        # two lengths, for batches and a window alone; one length has more windows than a batch
        windows = [window(i) for i in range(job.TOGETHER + 2)] + [window(20, N - 8), window(21, N - 8), window(22)]
        spec = SPEC | {"policy": kind, "kind": kind, "hyper_parameters": hyper_parameters} | options
        reader, timing = engine("llama"), {"prefill_s", "compress_s", "score_s", "peak_mem_mb"}
        rows = job.rows(reader, windows, spec, store)
        assert [row["window"] for row in rows] == [own["window"] for own in windows]
        for row, own in zip(rows, windows, strict=True):
            (alone,) = job.rows(reader, [own], spec, store)
            assert row["nll_sum"] == pytest.approx(alone["nll_sum"], rel=1e-5)
            apart = timing | {"nll_sum"}
            assert {k: v for k, v in row.items() if k not in apart} == {
                k: v for k, v in alone.items() if k not in apart
            }

    def test_a_probability_of_zero_is_an_error_and_no_number(self, store, monkeypatch):
        reader = engine("llama")
        real = reader.score
        monkeypatch.setattr(reader, "score", lambda *a, **kw: (real(*a, **kw)[0], torch.full((1,), torch.inf)))
        (row,) = job.rows(reader, [window()], SPEC, store)
        assert row["nll_sum"] is None
        assert row["error"].startswith("NOT_FINITE")

    def test_a_stored_prefill_gives_the_same_row(self, tmp_path):
        store = PrefillStore(tmp_path / "store", "always")
        reader, timing = engine("llama"), {"prefill_s", "compress_s", "score_s"}
        first, again = (
            {name: value for name, value in row.items() if name not in timing}
            for row in (job.rows(reader, [window()], SPEC, store)[0] for _ in range(2))
        )
        assert first == again
        assert "0" in store


FULL = SPEC | {"policy": "full", "kind": "full", "budget": "r1"}


CONFIG = {
    "experiment": "scored",
    "model": {"name": "resources/tiny-reader", "device": "cpu"},
    "perplexity": {
        "corpus": "synthetic",
        "context_tokens": [128, 192],
        "stride": 32,
        "books": 2,
        "windows_per_book": 2,
    },
    "kv": {
        "policies": {
            "full": {},
            "streaming_llm": {},
            "merge_0.5": {"kind": "entropy_merge", "target": "threshold"},
            "h2o": {},
        },
        "budgets": [1.0, 0.25, {"tokens": 32}],
    },
}


def changed(**sections) -> settings.Settings:
    config = {key: dict(value) if isinstance(value, dict) else value for key, value in CONFIG.items()}
    for name, keys in sections.items():
        config[name] = config[name] | keys
    return settings.parse(config)


class TestSettings:
    def test_policies_with_a_footprint_of_their_own_run_once_and_full_is_a_cell(self):
        assert perplexity_specs.cells(changed()) == [
            ("full", "r1"),
            ("streaming_llm", "r0.25"),
            ("streaming_llm", "t32"),
            ("merge_0.5", "r1"),
            ("h2o", "r0.25"),
            ("h2o", "t32"),
        ]
        assert perplexity_specs.cells(changed(perplexity={"policies": ["merge_0.5"]})) == [
            ("full", "r1"),
            ("merge_0.5", "r1"),
        ]

    def test_streaming_llm_turns_its_keys_unless_it_says_otherwise(self):
        def positions(**own):
            found = changed(kv={"policies": {"full": {}, "s": {"kind": "streaming_llm", **own}}})
            return perplexity_specs.cell(found, "s", "r0.25")["hyper_parameters"]["positions"]

        assert positions() == "cache"
        assert positions(positions="original") == "original"

    def test_a_spec_depends_on_what_its_result_does(self):
        """Check that a job's specification contains only the settings that change its result."""
        base = perplexity_specs.cell(changed(), "h2o", "r0.25")
        assert base == perplexity_specs.cell(changed(perplexity={"books": 3, "stride": 16}), "h2o", "r0.25")
        assert base != perplexity_specs.cell(changed(perplexity={"streaming": True}), "h2o", "r0.25")
        assert base["code"] != perplexity_specs.cell(changed(), "streaming_llm", "r0.25")["code"]
        windows = perplexity_specs.windows(changed())
        assert windows == perplexity_specs.windows(changed(perplexity={"streaming": True, "policies": ["h2o"]}))
        assert windows != perplexity_specs.windows(changed(perplexity={"stride": 16}))

    def test_the_content_of_a_local_corpus_counts(self, tmp_path):
        (tmp_path / "a.txt").write_text("one")
        own = changed(perplexity={"corpus": "text", "path": str(tmp_path)})
        before = perplexity_specs.windows(own)
        (tmp_path / "a.txt").write_text("two")
        specs.model.content.cache_clear()
        assert perplexity_specs.windows(own) != before

    @pytest.mark.parametrize(
        ("sections", "sentence"),
        [
            ({"perplexity": {"policies": ["h20"]}}, r"perplexity\.policies: there is no 'h20'; choose from full, "),
            (
                {"kv": {"policies": {"full": {}, "p": {"kind": "kvpress.KnormPress"}}}},
                r"kv\.policies\.p: a press compresses",
            ),
            (
                {"kv": {"policies": {"full": {}, "e": {"kind": "entropy_recall", "tau_quantile": 0.9}}}},
                r"kv\.policies\.e: its moments depend on the answers to a task",
            ),
            (
                {"perplexity": {"streaming": True}},
                r"kv\.policies\.merge_0\.5: entropy_merge cannot evict while a text is read",
            ),
            ({"perplexity": {"corpus": "text", "path": "no/where/at/all"}}, r"perplexity\.path: there is no file"),
            (
                {"perplexity": {"corpus": "pg19", "path": "some/mirror"}},
                r"perplexity\.revision: .*needs the commit \(40 hexadecimal digits\), not None",
            ),
        ],
    )
    def test_what_no_single_key_shows(self, sections, sentence):
        """Check error sentences for combinations of keys that are each valid alone."""
        with pytest.raises(UserError, match=sentence):
            specs.check(changed(**sections))

    @pytest.mark.parametrize(
        ("keys", "sentence"),
        [
            ({"context_tokens": [64, 64]}, r"perplexity\.context_tokens: lengths must be in increasing order"),
            ({"context_tokens": []}, r"perplexity\.context_tokens: give at least 1"),
            ({"corpus": "text"}, r"perplexity\.path: text needs a file or folder"),
            ({"books": None}, r"perplexity\.books: synthetic needs books"),
            ({"policies": ["h2o", "h2o"]}, r"perplexity\.policies: a name is listed twice"),
            ({"corpus": "wiki"}, r"perplexity\.corpus: 'wiki' is not allowed; choose one of"),
            ({"strides": 3}, r"perplexity\.strides: there is no such key; allowed here: corpus, path"),
        ],
    )
    def test_bad_values_are_one_sentence(self, keys, sentence):
        with pytest.raises(UserError, match=sentence):
            changed(perplexity=keys)


def run_jobs(found: settings.Settings, folder, monkeypatch) -> dict[tuple[str, str, int], list[dict]]:
    """Run the jobs of the windows and of every cell; return rows by policy, budget and bin."""
    monkeypatch.setenv("KVT_PREFILL_STORE", f"{folder}/store:always:1")
    monkeypatch.setenv("KVT_STATISTICS", ",".join(specs.statistics(found)))
    bins = [str(folder / f"bin{b}.parquet") for b in range(len(found.perplexity.context_tokens))]
    assert windows_job.main(["--spec", json.dumps(perplexity_specs.windows(found)), "--output", *bins]) == 0
    rows = {}
    for policy, budget in perplexity_specs.cells(found):
        spec = perplexity_specs.cell(found, policy, budget)
        for b, windows in enumerate(bins):
            output = str(folder / f"{policy}-{budget}-{b}.parquet")
            job.main(["--spec", json.dumps(spec), "--windows", windows, "--output", output])
            rows[policy, budget, b] = pq.read_table(output).to_pylist()
    return rows


def test_from_a_corpus_to_rows(tmp_path, monkeypatch):
    rows = run_jobs(changed(), tmp_path, monkeypatch)
    assert len(rows) == 12
    keys = {key: [(row["book_id"], row["window"]) for row in own] for key, own in rows.items()}
    assert len(set(map(tuple, keys.values()))) == 1, "all policies and bins have the same windows"
    assert len(rows["full", "r1", 0]) == 4, "each of two documents is long enough for its two windows"
    assert {row["context_tokens"] for row in rows["full", "r1", 1]} == {192}
    assert {row["budget_entries"] for row in rows["h2o", "r0.25", 1]} == {48}
    assert {row["budget_entries"] for row in rows["h2o", "t32", 1]} == {32}
    means = {key: sum(r["nll_sum"] for r in own) / sum(r["n_tokens"] for r in own) for key, own in rows.items()}
    assert means["full", "r1", 1] < means["streaming_llm", "t32", 1]
    about = read_metadata(tmp_path / "streaming_llm-t32-1.parquet")
    assert json.loads(about["hyper_parameters"])["positions"] == "cache"
    assert about["corpus"] == "synthetic"


@pytest.mark.parametrize("streaming", [False, True])
def test_real_books_on_a_real_model(kvt_data, tmp_path, monkeypatch, streaming):
    """Compare full with transformers' own loss on PG-19's books and stories260K, which reads 512 tokens."""
    from transformers import AutoModelForCausalLM

    model = str(kvt_data / "stories260K-hf")
    found = changed(
        model={"name": model},
        perplexity={
            "corpus": "pg19",
            "path": str(kvt_data / "pg19"),
            "context_tokens": [64, 128] if streaming else [128, 384],
            "stride": 64,
            "books": 3,
            "windows_per_book": 1 if streaming else 2,
            "streaming": streaming,
        },
        kv={"policies": {"full": {}, "streaming_llm": {}, "h2o": {}}, "budgets": [0.25]},
    )
    specs.check(found)
    rows = run_jobs(found, tmp_path, monkeypatch)
    plain = AutoModelForCausalLM.from_pretrained(model).eval()
    for b in range(2):
        windows = pq.read_table(tmp_path / f"bin{b}.parquet").to_pylist()
        assert len({own["book_id"] for own in windows}) == 3
        assert {own["context_ids"][0] for own in windows} == {1}, "each context begins with <s>"
        for own, row in zip(windows, rows["full", "r1", b], strict=True):
            ids = own["context_ids"] + own["target_ids"]
            labels = torch.tensor([[-100] * (len(ids) - 64) + ids[-64:]])
            with torch.no_grad():
                loss = plain(input_ids=torch.tensor([ids]), labels=labels).loss
            assert row["nll_sum"] / row["n_tokens"] == pytest.approx(float(loss), abs=1e-5)
        for policy in ("streaming_llm", "h2o"):
            held = found.perplexity.context_tokens[b] // 4
            assert {row["kept_mean"] for row in rows[policy, "r0.25", b]} == {held}
