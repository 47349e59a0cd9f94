"""The sections of an experiment file that all studies share, and their base class.

The keys of a single study are in ``studies/{study}/settings.py``; `kv_transition.settings` combines them.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from kv_transition import paths
from kv_transition.budget import Budget
from kv_transition.errors import UserError

Mode = Literal["before_question", "after_prompt"]

MODES: tuple[str, ...] = get_args(Mode)


def _no_parent(name: str) -> str:
    if name in (".", ".."):
        raise ValueError(f"{name!r} names a folder above; choose another name")
    return name


Name = Annotated[str, Field(pattern=rf"^({paths.POLICY})$", max_length=100), AfterValidator(_no_parent)]
"""name of a policy, which is also the name of a folder"""

Task = Annotated[str, Field(pattern=rf"^({paths.TASK})$", max_length=100)]

Seed = Annotated[int, Field(ge=0, lt=2**31)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Quantization(Section):
    """Weights in 4 bit, by bitsandbytes."""

    kind: Literal["nf4", "fp4"] = Field("nf4", description="number format of the weights")
    double_quantization: bool = Field(True, description="quantize the quantization constants as well")
    compute_dtype: Literal["float32", "bfloat16", "float16"] = Field("bfloat16", description="dtype of the products")


class Model(Section):
    """The model of the experiment."""

    name: str = Field(
        "resources/tiny-reader",
        min_length=1,
        description="local folder, hub id, or GGUF file (a path, or package:NAME/FILE.gguf)",
    )
    revision: str | None = Field(None, description="commit of the hub repository")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="dtype of weights and cache")
    max_length: int = Field(
        4352, ge=16, le=100_000_000, description="longest prompt in tokens; longer ones lose their middle"
    )
    chat_template: Literal["auto", "never"] = Field("auto", description="auto: used if the tokenizer has one")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda if available")
    device_map: Literal["auto", "balanced", "sequential"] | None = Field(
        None, description="how to distribute a model over several GPUs; null: all of it on one device"
    )
    quantization: Quantization | None = Field(None, description="weights in 4 bit; null: in dtype")
    attn_implementation: Literal["auto", "sdpa", "flash_attention_2"] = Field(
        "auto", description="implementation of attention; auto: flash_attention_2 if it can run, else sdpa"
    )
    attention_statistics: Literal["auto", "blocks", "flash", "triton"] = Field(
        "auto", description="implementation of the attention statistics; auto: the fastest that can run"
    )


def environment_name(name: str | None) -> str | None:
    # the message does not repeat the value, because it may be the key itself
    if name is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError("give the name of an environment variable, such as OPENAI_API_KEY, never the key itself")
    return name


def check_address(where: str, url: str) -> None:
    try:
        parts = urlsplit(url)
    except ValueError:
        parts = urlsplit("")
    if parts.username or parts.password or parts.query:
        raise ValueError(
            f"{where}: it contains a key or a password; put that into the environment variable that api_key_env names"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{where}: this is not an address such as http://127.0.0.1:8000/v1")


class EngineRequest(Section):
    """Time limit and retries of requests to an endpoint."""

    timeout_s: float = Field(60.0, gt=0, description="seconds of one request, up to the last piece of its answer")
    retries: int = Field(5, ge=0, description="further attempts after an error that may be temporary")
    concurrency: int = Field(4, ge=1, description="requests of a cell that run at the same time")
    stream: bool = Field(
        True, description="false: an answer arrives in one piece, and its time to first token is not measured"
    )


class Endpoint(Section):
    """The server of one policy; null means the engine's own value."""

    base_url: str | None = Field(None, description="address of a server of its own; null: engine.base_url")
    model: str | None = Field(None, description="name of the model at that server; null: engine.model")
    extra_body: dict[str, Any] = Field(
        {}, description="further fields of its requests; they override those of the engine"
    )


class Engine(Section):
    """What computes the answers: the model in this process, or an OpenAI-compatible endpoint."""

    kind: Literal["local", "openai"] = Field("local", description="openai: an OpenAI-compatible endpoint")
    base_url: str | None = Field(None, description="address up to and including /v1; required for openai")
    model: str | None = Field(None, description="name of the model at the endpoint; null: model.name")
    api: Literal["chat", "completions"] = Field("completions", description="the API path of the requests")
    send: Literal["auto", "text", "tokens"] = Field(
        "auto", description="completions: form of the prompts; auto: tokens for a kv_transition server, else text"
    )
    api_key_env: str | None = Field("OPENAI_API_KEY", description="environment variable that holds the key")
    serves: Literal["kv_transition"] | None = Field(
        None,
        description="kv_transition: a server of python -m kv_transition serve, whose requests name policy and budget",
    )
    extra_body: dict[str, Any] = Field({}, description="further fields of every request")
    request: EngineRequest = EngineRequest()
    endpoints: dict[str, Endpoint] = Field({}, description="policy or policy@budget: its server")

    @field_validator("api_key_env")
    @classmethod
    def _a_name(cls, name: str | None) -> str | None:
        return environment_name(name)

    @model_validator(mode="after")
    def _addresses(self) -> Engine:
        if self.kind == "openai" and not self.base_url:
            raise ValueError("base_url: openai needs the address of the endpoint, such as http://127.0.0.1:8000/v1")
        others = {f"endpoints.{name}.base_url": endpoint.base_url for name, endpoint in self.endpoints.items()}
        for where, url in ({"base_url": self.base_url} | others).items():
            if url is not None:
                check_address(where, url)
        return self


class Prefill(Section):
    """Stored prefills: each prompt is read once, and the tensors may be deleted at any time."""

    store: Literal["auto", "always", "never"] = Field(
        "auto", description="auto: as long as max_gb and the disk allow it"
    )
    max_gb: float = Field(
        50.0, gt=0, description="largest size of the store; the least recently used prefills are deleted first"
    )
    chunk_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="longest piece of a prompt read at a time; null: all of it"
    )


class TokenBudget(Section):
    tokens: int = Field(ge=1, description="entries kept per KV head")


class KV(Section):
    """Policies, budgets and modes."""

    modes: list[Mode] = Field(["before_question", "after_prompt"], min_length=1, description="when compression happens")
    policies: dict[Name, dict[str, Any] | None] = Field(
        {"full": {}}, min_length=1, description="name: {kind (default: the name), hyper-parameters of the kind}"
    )
    budgets: list[float | TokenBudget] | None = Field(
        None, min_length=1, description="fractions kept in (0, 1], or {tokens: n}"
    )
    compression_ratio: list[float] | None = Field(
        None,
        min_length=1,
        description="fractions removed in [0, 1): another way to give budgets; not together with budgets",
    )
    match: Literal["none", "mean", "final"] = Field(
        "none",
        description="mean, final: K such that the footprint over the answer is the budget's share of a full cache, "
        "for policies that act each step and for those that compress once; none: the same K for both",
    )
    first_token: Literal["compressed", "full"] = Field(
        "compressed", description="after_prompt: the cache that the first answer token is computed from"
    )

    @field_validator("modes")
    @classmethod
    def _modes_once(cls, modes: list[str]) -> list[str]:
        if len(set(modes)) < len(modes):
            raise ValueError(f"a mode is listed twice in {', '.join(modes)}; give each once")
        return modes

    @field_validator("policies")
    @classmethod
    def _empty_is_default(cls, policies: dict[str, dict[str, Any] | None]) -> dict[str, dict[str, Any]]:
        return {name: options or {} for name, options in policies.items()}

    @model_validator(mode="after")
    def _budgets_once(self) -> KV:
        if self.budgets is not None and self.compression_ratio is not None:
            raise ValueError("budgets: budgets and compression_ratio mean the same; give one of them")
        if self.budgets is None and self.compression_ratio is None:
            raise ValueError("budgets: this key is required; give fractions to keep such as [1.0, 0.5, 0.2]")
        try:
            names = [str(budget) for budget in self.all_budgets()]
        except UserError as error:
            raise ValueError(str(error)) from None
        if len(set(names)) < len(names):
            raise ValueError(f"budgets: a budget is listed twice in {', '.join(names)}; give each once")
        return self

    def all_budgets(self) -> list[Budget]:
        """Return the budgets in the order of the configuration."""
        if self.compression_ratio is not None:
            for ratio in self.compression_ratio:
                if not 0 <= ratio < 1:
                    raise UserError(f"compression_ratio: {ratio} lies outside [0, 1); give the fraction to remove")
            # Decimal arithmetic: 1 - 0.8 is 0.2, not 0.19999999999999996
            return [
                Budget.of_fraction(str(1 - Decimal(str(ratio))), "compression_ratio")
                for ratio in self.compression_ratio
            ]
        return [
            Budget.of_tokens(b.tokens, "budgets") if isinstance(b, TokenBudget) else Budget.of_fraction(b, "budgets")
            for b in self.budgets or []
        ]


class Decoding(Section):
    """How answers are generated."""

    temperature: float = Field(0.0, ge=0, description="0: greedy")
    max_tokens: Literal["task"] | Annotated[int, Field(ge=1)] = Field("task", description="longest answer in tokens")
    repeats: int = Field(1, ge=1, le=10_000, description="answers per example")
    batch: int = Field(
        1, ge=1, le=10_000, description="number of answers decoded together; latencies are those of the batch"
    )
    compile: bool = Field(
        False, description="on a GPU: one compiled graph per decode step, unless the policy acts each step"
    )
    seed: Seed = Field(0, description="seed of sampling and of random policies")
    compress_every: int | None = Field(
        None,
        ge=1,
        le=65_536,
        description="entries above the budget at which the cache is compressed again; null: decided by the policy",
    )
    budget_of: Literal["prompt", "length"] = Field(
        "prompt", description="compress_every: what a budget is a fraction of, the prompt or all tokens read so far"
    )
    max_entries: int | None = Field(None, ge=1, description="compress_every: upper limit of the entries of a budget")


class Statistics(Section):
    confidence: float = Field(0.95, gt=0.5, lt=1, description="confidence level of every interval")
    resamples: int = Field(10000, ge=100, le=1_000_000, description="bootstrap resamples")
    seed: Seed = Field(0, description="seed of the bootstrap")


class Report(Section):
    title: str | None = Field(None, description="title of the report; null: the experiment's name")
    sqlite: bool = Field(True, description="write kv_transition.sqlite as well")


class Output(Section):
    dir: str = Field("results", min_length=1, max_length=1000, description="folder of everything that is generated")


class Hardware(Section):
    """The resources that one GPU job requests from a cluster."""

    gpu_model: str = Field("a100", pattern=r"^[A-Za-z0-9_.-]+$", description="model of the GPU")
    runtime_min: int = Field(60, ge=1, description="minutes of the first attempt")
    mem_gb: int = Field(48, ge=1, description="host memory of the first attempt")
