"""The local engine: a transformers model that reads tokens on top of a `CacheState`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kv_transition.attention import statistics as attention_statistics
from kv_transition.cache.state import EVERY, MOMENTS, STATISTICS, CacheState
from kv_transition.cache.store import Prefill
from kv_transition.engines import attend, loading
from kv_transition.engines.last_token import mlp_of_last_token
from kv_transition.engines.projection import output_projections
from kv_transition.engines.reading import BeforeAttention, Reading
from kv_transition.engines.reconstruct import reconstructed
from kv_transition.engines.several import Readings, treat_tokens_alone
from kv_transition.errors import UserError

_SCORED = 256
"""number of tokens whose logits are held at once: 128 MiB for a vocabulary of 128 k"""

GREEDY_BELOW = 1e-5
"""Below this temperature the most likely token is chosen. A draw would choose the same token unless logits differ by
less than about 1e-4, and a division by a much smaller temperature would exceed the range of fp32"""


class LocalEngine:
    """Reads tokens on top of a cache that may be compressed between readings."""

    name = "local"
    load_s = 0.0
    """seconds of loading the model, if it was loaded for a job"""

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Any = None,
        *,
        attention: str = "auto",
        statistics: str = "auto",
        chunk_tokens: int | None = None,
    ):
        """Set up the engine for a loaded model.

        attention, statistics: the implementations. chunk_tokens: the longest piece that is read at a time, so that the
        activations of a long prompt fit into memory beside its cache; None: any length at once.
        """
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.device = loading.input_device(model)
        self.chunk_tokens = chunk_tokens
        if chunk_tokens is not None and (kind := loading.length_dependent_rope(model.config)):
            raise UserError(
                f"prefill.chunk_tokens: this model's rope scaling ({kind}) depends on the length read so far, so "
                "pieces cannot be combined; remove this key"
            )
        self._treats_tokens_alone = False
        # one pass has one rotation, which would be that of the longest sequence, so such a model reads alone
        self._reads_alone = bool(loading.length_dependent_rope(model.config))
        self.windows = loading.layer_windows(model.config)
        self.rotaries = loading.layer_rotaries(model)
        eos = model.generation_config.eos_token_id
        self.eos: frozenset[int] = frozenset([] if eos is None else [eos] if isinstance(eos, int) else eos)
        dtype = model.dtype
        self.attention = attend.choose(attention, self.device, dtype)
        self.statistics_asked = statistics
        # a merged or padded cache may need another implementation: `auto` chooses for each call
        self.statistics_by = attention_statistics.choose(
            self.device.type, dtype, head_dim=_head_dim(model.config), implementation=statistics
        )

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        revision: str | None = None,
        dtype: str = "float32",
        device: str = "auto",
        quantization: Mapping[str, Any] | None = None,
        device_map: str | None = None,
        attention: str = "auto",
        statistics: str = "auto",
        chunk_tokens: int | None = None,
    ) -> LocalEngine:
        """Load a model from a folder or the hub. Raises UserError if that fails or the model cannot be evicted."""
        model = loading.load_model(
            name, revision=revision, dtype=dtype, device=device, quantization=quantization, device_map=device_map
        )
        from kv_transition.data.tokens import load_tokenizer

        tokenizer = load_tokenizer(name, revision)
        return cls(model, tokenizer, attention=attention, statistics=statistics, chunk_tokens=chunk_tokens)

    @property
    def layer_devices(self) -> list[str]:
        """Return the device of each layer; a large model may be distributed over several GPUs."""
        return [str(device) for device in loading.layer_devices(self.model)]

    @property
    def description(self) -> dict[str, str]:
        """Return the implementations of attention and its statistics, for the metadata of results."""
        if self.attention == "sdpa":
            version = torch.__version__
        else:
            from importlib.metadata import version as version_of

            version = version_of("flash_attn")
        return {
            "attention": self.attention,
            "attention_version": version,
            "attention_statistics": self.statistics_by,
            "device": self.device_name,
        }

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    @torch.inference_mode()
    def extend(
        self,
        state: CacheState | None,
        tokens: Sequence[int] | Sequence[Sequence[int]],
        statistics: frozenset[str] = STATISTICS,
        room: int = 0,
        seen: list[Tensor] | None = None,
        before_attention: BeforeAttention | None = None,
        repeat: bool = True,
    ) -> CacheState:
        """Return the state after reading ``tokens`` (at least one). ``state`` is unchanged; None is the empty state.

        tokens: for a batch, the same number for each sequence. statistics: those to maintain; others are dropped.
        ``reconstruction`` reads several tokens of a single sequence a second time; a single token is not repeated.
        room: number of entries to leave space for, so that further reading need not copy the cache. seen: receives
        [Hkv, n] for each evictable layer, the attention that its entries receive from one token (only if ``attn_sum``
        is maintained). before_attention: called for each evictable layer with the new tokens' queries and keys; it
        returns the layer that is attended to. repeat: false leaves the second reading to `repeated`.
        """
        for piece in self._pieces(state, tokens, statistics, room, seen, before_attention):
            after, _ = piece
        if repeat and "reconstruction" in statistics and _is_flat(tokens) and len(tokens) > 1:
            return self.repeated(after, tokens)
        return after

    def repeated(self, state: CacheState, tokens: Sequence[int]) -> CacheState:
        """Return the state with ``reconstruction`` of ``tokens``, which were read last and not evicted."""
        return reconstructed(self, state, tokens)

    @cached_property
    def projections(self) -> list[Tensor]:
        """Return the output projection of each layer by query head, [H, d, D]. Raises UserError if it is not known."""
        return output_projections(self.model)

    @torch.inference_mode()
    def score(
        self,
        state: CacheState | None,
        tokens: Sequence[int] | Sequence[Sequence[int]],
        targets: Sequence[int] | Sequence[Sequence[int]],
        statistics: frozenset[str] = STATISTICS,
        room: int = 0,
        before_attention: BeforeAttention | None = None,
    ) -> tuple[CacheState, Tensor]:
        """Read ``tokens`` as `extend` does, and return the state and the negative log-likelihood of ``targets``.

        targets: the token that follows each of ``tokens``. Returns -log p of each target in nats, fp32 [n] ([B, n] for
        a batch). Logits are computed for a few hundred tokens at a time, so that [n, V] is never held.
        """
        wanted = torch.tensor(targets, device=self.device)
        nats, done = [], 0
        for piece in self._pieces(state, tokens, statistics, room, None, before_attention, _SCORED):
            after, logits = piece
            own = wanted[..., done : done + logits.shape[1]]
            found = torch.nn.functional.cross_entropy(logits.flatten(0, 1), own.flatten(), reduction="none")
            nats.append(found.view(own.shape))
            done += logits.shape[1]
        return after, torch.cat(nats, -1)

    @torch.inference_mode()
    def logits(
        self,
        state: CacheState | None,
        tokens: Sequence[int] | Sequence[Sequence[int]],
        statistics: frozenset[str] = STATISTICS,
        before_attention: BeforeAttention | None = None,
    ) -> tuple[CacheState, Tensor]:
        """Return the state after reading ``tokens`` as `extend` does, and the logits after each of them, fp32 [n, V]
        (of a batch [B, n, V]).
        """
        pieces = [*self._pieces(state, tokens, statistics, 0, None, before_attention, _SCORED)]
        logits = torch.cat([own for _, own in pieces], 1)
        return pieces[-1][0], logits[0] if _is_flat(tokens) else logits

    def _pieces(
        self,
        state: CacheState | None,
        tokens: Sequence[int] | Sequence[Sequence[int]],
        statistics: frozenset[str],
        room: int,
        seen: list[Tensor] | None,
        before_attention: BeforeAttention | None,
        scored: int | None = None,
    ) -> Iterator[tuple[CacheState, Tensor]]:
        """Yield the state after each piece of ``tokens`` with logits fp32 [B, q, V].

        The logits are those of the piece's last token, or of all its tokens if ``scored`` limits their number.
        """
        state = state or CacheState(layers=(), length=0)
        if statistics & MOMENTS:  # neither can be maintained without the other
            statistics |= MOMENTS
        self._require(statistics, state)
        ids = torch.tensor(tokens, device=self.device).reshape(-1, len(tokens) if _is_flat(tokens) else len(tokens[0]))
        total = ids.shape[1]
        chunk = min(self.chunk_tokens or total, scored or total)
        for start in range(0, total, chunk):
            piece = ids[:, start : start + chunk]
            behind = room + total - start - piece.shape[1]
            kept = piece.shape[1] if scored else 1
            state, logits = self._read(state, piece, statistics, behind, seen, before_attention, kept)
            yield state, logits

    def _read(
        self,
        state: CacheState,
        ids: Tensor,
        statistics: frozenset[str],
        room: int,
        seen: list[Tensor] | None,
        before_attention: BeforeAttention | None,
        logits_to_keep: int,
    ) -> tuple[CacheState, Tensor]:
        reading = self._reading(state, ids.shape[1], statistics, room, seen, before_attention)
        reading.last_only = logits_to_keep == 1 < ids.shape[1]
        with mlp_of_last_token(self.model, ids.shape[1], reading.last_only):
            logits = self._logits(ids, reading, logits_to_keep)
        # a copy, because the state must not keep all logits of the forward pass alive
        last = logits[:, -1].clone() if logits_to_keep > 1 else logits[:, -1]
        after = CacheState(
            layers=tuple(reading.read),
            length=state.length + ids.shape[1],
            logits=last if isinstance(state.length, Tensor) else last[0],
            shift=state.shift,
        )
        return after, logits

    def share_passes(self) -> None:
        """Let `extend_each` read all its tokens with one pass; from now on `extend` treats a single token alike.

        On a CPU in fp32 this takes the memory of the linear layers once more, and results of a single token may differ
        in the last bit from those before.
        """
        if not self._treats_tokens_alone and not self._reads_alone:
            treat_tokens_alone(self.model)
            self._treats_tokens_alone = True

    @torch.inference_mode()
    def extend_each(
        self,
        states: Sequence[CacheState],
        tokens: Sequence[int],
        statistics: Sequence[frozenset[str]],
        rooms: Sequence[int],
        before_attention: Sequence[BeforeAttention | None],
    ) -> list[CacheState]:
        """Read one token on top of each of several states of single sequences, in one pass through the weights.

        Call it after `share_passes`. The states may have any lengths, kinds of layers and statistics; the arguments are
        those of `extend`, one for each state. The results equal those of separate calls of `extend` bit by bit on a CPU
        in fp32; elsewhere they differ by the rounding of matrix products with several rows.
        """
        if self._reads_alone or not self._treats_tokens_alone:
            each = zip(states, tokens, statistics, rooms, before_attention, strict=True)
            return [self.extend(s, [token], kept, room, None, before) for s, token, kept, room, before in each]
        own = zip(states, statistics, rooms, before_attention, strict=True)
        readings = [self._reading(state, 1, kept, room, None, before) for state, kept, room, before in own]
        ids = torch.tensor(tokens, device=self.device).view(-1, 1)
        logits = self._logits(ids, Readings(readings), 1)[:, -1]
        return [
            CacheState(tuple(reading.read), state.length + 1, row, state.shift)
            for reading, state, row in zip(readings, states, logits, strict=True)
        ]

    def _reading(
        self,
        state: CacheState,
        q: int,
        statistics: frozenset[str],
        room: int,
        seen: list[Tensor] | None,
        before_attention: BeforeAttention | None,
    ) -> Reading:
        return Reading(
            state,
            q,
            statistics=statistics,
            room=room,
            rotaries=self.rotaries,
            windows=self.windows,
            implementations=(self.attention, self.statistics_asked),
            device=self.device,
            seen=seen,
            before_attention=before_attention,
            projections=self.projections if "output_norm" in statistics else None,
        )

    def _logits(self, ids: Tensor, reading: Reading | Readings, logits_to_keep: int) -> Tensor:
        """Return logits fp32 [B, logits_to_keep, V] after ids [B, q]."""
        output = self.model(
            input_ids=ids,
            position_ids=reading.position_ids,
            past_key_values=reading,
            use_cache=True,
            logits_to_keep=logits_to_keep,
            reading=reading,
        )
        if isinstance(reading, Reading) and len(reading.read) != len(self.windows):
            raise UserError(
                f"model.name: of {type(self.model).__name__}, {len(reading.read)} of {len(self.windows)} layers use "
                "transformers' attention interface, but eviction needs all of them; choose another model"
            )
        return output.logits.float()

    def _require(self, statistics: frozenset[str], state: CacheState) -> None:
        if unknown := statistics - EVERY:
            known = ", ".join(sorted(EVERY))
            raise UserError(f"the local engine cannot compute {', '.join(sorted(unknown))}; it can compute {known}")
        for part in (part for layer in state.evictable[:1] for part in layer.parts[:1]):
            unknowable = frozenset() if part.rotary else MOMENTS
            if gone := sorted(name for name in statistics - unknowable if getattr(part, name) is None):
                raise UserError(
                    f"{', '.join(gone)} cannot be continued, because the cache was read without; read it again"
                )

    def prefill(
        self,
        context: Sequence[int],
        question: Sequence[int],
        statistics: frozenset[str] = STATISTICS,
        read: tuple[CacheState, float] | None = None,
    ) -> Prefill:
        """Return the states of a prompt read once with the full cache, for both modes.

        read: the state and the seconds of the context, if it was read before with these statistics.
        """
        if read is None:
            started = self.clock()
            state = self.extend(None, context, statistics, room=len(question))
            read = state, self.clock() - started
        after_context, seconds = read
        between = self.clock()
        after_prompt = self.extend(after_context, question, statistics) if len(question) else after_context
        return Prefill(after_context, after_prompt, seconds, self.clock() - between)

    def next_tokens(
        self, logits: Tensor, temperature: float, generators: Sequence[torch.Generator | None]
    ) -> list[int]:
        """Return the next token of each sequence from logits [B, V]: a sample, or the most likely one below
        `GREEDY_BELOW`.
        """
        if temperature < GREEDY_BELOW:
            return logits.argmax(-1).tolist()
        probabilities = (logits / temperature).softmax(-1).cpu()
        return [int(torch.multinomial(p, 1, generator=g)) for p, g in zip(probabilities, generators, strict=True)]

    def clock(self) -> float:
        """Return a time in seconds: wall time on a GPU, CPU time of this process on a CPU.

        On a GPU its queue is emptied first. On a CPU, cells run with one thread each, so jobs on other cores do not
        lengthen it.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter()
        return time.process_time()

    def peak_memory_mb(self) -> float | None:
        """Return the peak device memory in MiB since the last call; None if it cannot be measured."""
        if self.device.type != "cuda":
            return None
        devices = {torch.device(device) for device in self.layer_devices}
        peak = sum(torch.cuda.max_memory_allocated(device) for device in devices) / 2**20
        for device in devices:
            torch.cuda.reset_peak_memory_stats(device)
        return peak


def _is_flat(tokens: Sequence[Any]) -> bool:
    return not isinstance(tokens[0], Sequence)


def _head_dim(config: Any) -> int:
    text = config.get_text_config()
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
