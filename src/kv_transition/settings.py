"""The experiment as one typed, frozen model. Every default of the project lives here.

``workflow/schemas/config.schema.yaml`` is derived from it (`json_schema`), config/README.md explains each key.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin
from urllib.parse import urlsplit

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from kv_transition import paths
from kv_transition.budget import Budget
from kv_transition.errors import UserError

Mode = Literal["before_question", "after_prompt"]
MODES: tuple[str, ...] = get_args(Mode)

Name = Annotated[str, Field(pattern=rf"^({paths.POLICY})$")]
Task = Annotated[str, Field(pattern=rf"^({paths.TASK})$")]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Dataset(Section):
    """Where the examples come from."""

    name: Literal["synthetic", "ruler", "longbench", "jsonl"] = Field("synthetic", description="loader of the examples")
    tasks: list[Task] = Field(["reader_qa"], min_length=1, description="tasks of the data set")
    revision: str | None = Field(
        None, description="commit (40 hex digits) of the hub repository; required when it is downloaded"
    )
    path: str | None = Field(None, description="local folder or file; longbench also takes a hub repository owner/name")
    split: str = Field("test", description="split of the data set")
    prompts: str | None = Field(None, description="LongBench's dataset2prompt.json")
    max_lengths: str | None = Field(None, description="LongBench's dataset2maxlen.json")
    lengths: list[Annotated[int, Field(ge=64)]] | None = Field(None, description="synthetic, ruler: sizes in tokens")
    n_per_length: Annotated[int, Field(ge=1)] | None = Field(None, description="synthetic, ruler: how many of each")
    seed: Seed = Field(0, description="synthetic, ruler: seed of the documents")

    @model_validator(mode="after")
    def _complete(self) -> Dataset:
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError("tasks: a task is listed twice; name each once")
        if self.name in ("synthetic", "ruler") and not (self.lengths and self.n_per_length):
            raise ValueError(f"lengths: {self.name} needs lengths (such as [256, 512]) and n_per_length (such as 40)")
        if self.name == "jsonl" and not self.path:
            raise ValueError("path: jsonl needs the .jsonl file or the folder that holds {task}.jsonl")
        return self


class Binning(Section):
    """Length bins on the untruncated prompt tokens."""

    n_bins: int = Field(5, ge=1, le=50, description="number of length bins")
    edges: list[Annotated[int, Field(ge=0)]] | None = Field(None, description="n_bins + 1 edges; null: quantiles")
    n_per_bin: int = Field(20, ge=1, description="examples chosen in each bin")
    strict: bool = Field(False, description="stop when a bin has fewer examples than n_per_bin")
    seed: Seed = Field(0, description="seed of the choice")

    @field_validator("edges")
    @classmethod
    def _rising(cls, edges: list[int] | None) -> list[int] | None:
        if edges is not None and any(a >= b for a, b in pairwise(edges)):
            raise ValueError(f"edges must rise from each to the next, not {edges}")
        return edges

    @model_validator(mode="after")
    def _count(self) -> Binning:
        if self.edges is not None and len(self.edges) != self.n_bins + 1:
            raise ValueError(f"edges: give n_bins + 1 = {self.n_bins + 1} numbers, not {len(self.edges)}")
        return self


class Quantization(Section):
    """Weights in 4 bit, by bitsandbytes."""

    kind: Literal["nf4", "fp4"] = Field("nf4", description="number format of the weights")
    double_quantization: bool = Field(True, description="quantize the quantization constants as well")
    compute_dtype: Literal["float32", "bfloat16", "float16"] = Field("bfloat16", description="dtype of the products")


class Model(Section):
    """The one model of the experiment."""

    name: str = Field(
        "resources/tiny-reader",
        min_length=1,
        description="local folder, hub id, or GGUF file (a path, or package:NAME/FILE.gguf)",
    )
    revision: str | None = Field(None, description="commit of the hub repository")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="dtype of weights and cache")
    max_length: int = Field(4352, ge=16, description="longest prompt in tokens; longer ones lose their middle")
    chat_template: Literal["auto", "never"] = Field("auto", description="auto: where the tokenizer has one")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one")
    device_map: Literal["auto", "balanced", "sequential"] | None = Field(
        None, description="how to lay a model over several GPUs; null: all of it on one device"
    )
    quantization: Quantization | None = Field(None, description="weights in 4 bit; null: in dtype")
    attn_implementation: Literal["auto", "sdpa", "flash_attention_2"] = Field(
        "auto", description="attention output; auto: flash_attention_2 where it can run, else sdpa"
    )
    attention_statistics: Literal["auto", "blocks", "flash", "triton"] = Field(
        "auto", description="what computes the attention statistics; auto: the fastest that can run"
    )


def _environment_name(name: str | None) -> str | None:
    # never repeats what was given: it may be the key itself
    if name is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError("give the name of an environment variable, such as OPENAI_API_KEY, never the key itself")
    return name


def _check_address(where: str, url: str) -> None:
    try:
        parts = urlsplit(url)
    except ValueError:
        parts = urlsplit("")
    if parts.username or parts.password or parts.query:
        raise ValueError(f"{where}: it holds a key or a password; give that in the variable api_key_env names")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{where}: it is no address such as http://127.0.0.1:8000/v1")


class EngineRequest(Section):
    """How patient we are with an endpoint."""

    timeout_s: float = Field(60.0, gt=0, description="seconds of one request, until the last piece of its answer")
    retries: int = Field(5, ge=0, description="further attempts where one may help")
    concurrency: int = Field(4, ge=1, description="requests of a cell under way at a time")
    stream: bool = Field(True, description="false: answers come in one piece, without the time to their first token")


class Endpoint(Section):
    """The server that stands for a policy; a null is the engine's own."""

    base_url: str | None = Field(None, description="address of a server of its own; null: engine.base_url")
    model: str | None = Field(None, description="name of the model there; null: engine.model")
    extra_body: dict[str, Any] = Field({}, description="further fields of its requests, over those of the engine")


class Engine(Section):
    """What answers: the model in this process, or an OpenAI-compatible endpoint."""

    kind: Literal["local", "openai"] = Field("local", description="openai: an OpenAI-compatible endpoint")
    base_url: str | None = Field(None, description="address up to and including /v1; required for openai")
    model: str | None = Field(None, description="what the endpoint calls the model; null: model.name")
    api: Literal["chat", "completions"] = Field("completions", description="the path that is asked")
    send: Literal["auto", "text", "tokens"] = Field(
        "auto", description="completions: what prompts are sent as; auto: tokens to kv_transition, else text"
    )
    api_key_env: str | None = Field("OPENAI_API_KEY", description="environment variable that holds the key")
    serves: Literal["kv_transition"] | None = Field(
        None, description="kv_transition: python -m kv_transition serve, which takes policy and budget with a request"
    )
    extra_body: dict[str, Any] = Field({}, description="further fields of every request")
    request: EngineRequest = EngineRequest()
    endpoints: dict[str, Endpoint] = Field({}, description="policy or policy@budget: what stands for it")

    @field_validator("api_key_env")
    @classmethod
    def _a_name(cls, name: str | None) -> str | None:
        return _environment_name(name)

    @model_validator(mode="after")
    def _addresses(self) -> Engine:
        if self.kind == "openai" and not self.base_url:
            raise ValueError("base_url: openai needs the address of the endpoint, such as http://127.0.0.1:8000/v1")
        others = {f"endpoints.{name}.base_url": endpoint.base_url for name, endpoint in self.endpoints.items()}
        for where, url in ({"base_url": self.base_url} | others).items():
            if url is not None:
                _check_address(where, url)
        return self


class Prefill(Section):
    """Reading each prompt once: the tensors are a cache that may be deleted at any time."""

    store: Literal["auto", "always", "never"] = Field("auto", description="auto: while max_gb and the disk allow")
    max_gb: float = Field(50.0, gt=0, description="largest size of the store; the least recently used go first")
    chunk_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="longest piece of a prompt read at a time; null: all of it"
    )


class TokenBudget(Section):
    tokens: int = Field(ge=1, description="entries kept per KV head")


class KV(Section):
    """What is forgotten, how and when."""

    modes: list[Mode] = Field(["before_question", "after_prompt"], min_length=1, description="when compression happens")
    policies: dict[Name, dict[str, Any] | None] = Field(
        {"full": {}}, min_length=1, description="name: {kind (default: the name), hyper-parameters of the kind}"
    )
    budgets: list[float | TokenBudget] | None = Field(
        None, min_length=1, description="fractions kept in (0, 1], or {tokens: n}"
    )
    compression_ratio: list[float] | None = Field(
        None, min_length=1, description="fractions removed in [0, 1): another way to give budgets, never with them"
    )
    first_token: Literal["compressed", "full"] = Field(
        "compressed", description="after_prompt: which cache the first answer token is read from"
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
            raise ValueError("budgets: budgets and compression_ratio say the same thing; give one of them")
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
        """The budgets in the order of the config."""
        if self.compression_ratio is not None:
            for ratio in self.compression_ratio:
                if not 0 <= ratio < 1:
                    raise UserError(f"compression_ratio: {ratio} lies outside [0, 1); give the fraction to remove")
            # Decimal arithmetic: 1 - 0.8 is 0.2, not 0.19999999999999996
            from decimal import Decimal

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
    repeats: int = Field(1, ge=1, description="answers per example")
    batch: int = Field(1, ge=1, description="answers decoded together; latencies are those of the batch")
    compile: bool = Field(False, description="on a GPU: one compiled graph a step, unless the policy acts each step")
    seed: Seed = Field(0, description="seed of sampling and of random policies")


class Observe(Section):
    """What policies would hold beside a full cache, step by step."""

    enabled: bool = Field(False, description="true: observe each task and bin")
    policies: list[Name] | None = Field(
        None, min_length=1, description="names of kv.policies, and oracle; null: all that can be observed, and oracle"
    )
    budgets: list[float] = Field([0.1, 0.2, 0.3, 0.5], min_length=1, description="fractions held, in (0, 1)")
    granularities: list[Literal["global", "per_head"]] = Field(
        ["global", "per_head"], min_length=1, description="one set for the model, one for each KV head"
    )
    memories: list[Literal["ideal", "irreversible"]] = Field(
        ["ideal", "irreversible"], min_length=1, description="whether what was once evicted may come back"
    )
    max_tokens: Literal["task"] | Annotated[int, Field(ge=1)] = Field("task", description="longest answer in tokens")
    entropy_gap_every: int = Field(0, ge=0, description="measure the entropy gaps at every such step; 0: never")
    reasoning: bool = Field(False, description="begin each answer so that the model reasons step by step")
    continuations: bool = Field(False, description="also go on from each context alone, with no question")

    @model_validator(mode="after")
    def _each_once(self) -> Observe:
        for key in ("policies", "budgets", "granularities", "memories"):
            values = getattr(self, key) or []
            if len(set(values)) < len(values):
                raise ValueError(f"{key}: a value is listed twice in {', '.join(map(str, values))}; give each once")
        for fraction in self.budgets:
            if not 0 < fraction < 1:
                raise ValueError(
                    f"budgets: {fraction} lies outside (0, 1); give the fraction that is held, such as 0.2"
                )
        return self

    def all_budgets(self) -> list[Budget]:
        return [Budget.of_fraction(fraction, "observe.budgets") for fraction in self.budgets]


class Perplexity(Section):
    """Text that is scored token by token from a compressed cache."""

    corpus: Literal["text", "pg19", "synthetic"] = Field("text", description="kind of the books")
    path: str | None = Field(None, description="text, pg19: a local file or folder, or a hub repository owner/name")
    revision: str | None = Field(None, description="commit (40 hex digits) of the hub repository; required for one")
    split: str = Field("test", description="split of the hub repository; of the synthetic documents: test or train")
    text_field: str = Field("text", min_length=1, description="Parquet, JSONL: the column with a book's text")
    book_field: str | None = Field(
        None, min_length=1, description="Parquet, JSONL: the column with a book's name; null: a hash of its text"
    )
    context_tokens: list[Annotated[int, Field(ge=2)]] = Field(
        [1024], min_length=1, description="tokens read before any is scored, rising: a length bin each"
    )
    stride: int = Field(256, ge=1, description="tokens scored in each window")
    books: Annotated[int, Field(ge=1)] | None = Field(None, description="books, drawn at random; null: all")
    windows_per_book: Annotated[int, Field(ge=1)] | None = Field(
        None, description="windows of each book, drawn at random; null: all"
    )
    bos: Literal["auto", "never"] = Field(
        "auto", description="auto: each context begins with the token that the tokenizer puts before a text"
    )
    streaming: bool = Field(False, description="true: the policy acts from the first token of the context on")
    streaming_chunk: int = Field(1, ge=1, description="streaming: tokens of the context read at a time")
    policies: list[Name] | None = Field(
        None, min_length=1, description="names of kv.policies; null: all. full is always among them"
    )
    seed: Seed = Field(0, description="seed of books, windows and random policies")

    @field_validator("context_tokens")
    @classmethod
    def _rising(cls, lengths: list[int]) -> list[int]:
        if any(a >= b for a, b in pairwise(lengths)):
            raise ValueError(f"lengths must rise from each to the next, not {lengths}")
        return lengths

    @model_validator(mode="after")
    def _complete(self) -> Perplexity:
        if self.policies is not None and len(set(self.policies)) < len(self.policies):
            raise ValueError(f"policies: a name is listed twice in {', '.join(self.policies)}; give each once")
        if self.corpus != "synthetic" and self.path is None:
            raise ValueError(
                f"path: {self.corpus} needs a file or folder of .txt, .txt.gz, .jsonl, .jsonl.gz or .parquet, or a hub "
                "repository owner/name"
            )
        if self.corpus == "synthetic" and not (self.books and self.windows_per_book):
            raise ValueError("books: synthetic needs books (such as 10) and windows_per_book (such as 4)")
        return self


class Judge(EngineRequest):
    """A language model that is asked whether an answer follows an instruction, beside the rules."""

    base_url: str = Field(description="address of an OpenAI-compatible endpoint, up to and including /v1")
    model: str = Field(min_length=1, description="what the endpoint calls the model")
    api_key_env: str | None = Field("OPENAI_API_KEY", description="environment variable that holds the key")
    max_tokens: int = Field(512, ge=16, description="longest verdict in tokens")

    @field_validator("api_key_env")
    @classmethod
    def _a_name(cls, name: str | None) -> str | None:
        return _environment_name(name)

    @model_validator(mode="after")
    def _address(self) -> Judge:
        _check_address("base_url", self.base_url)
        return self


class Chat(Section):
    """Conversations, played turn by turn on one growing cache that is compressed after each answer."""

    source: Literal["turns", "mt_bench", "mt_eval", "generated"] = Field(
        "generated", description="format of the conversations; generated: made on the spot for the embedded follower"
    )
    path: str | None = Field(None, description="the file, .json, .jsonl or either with .gz; null where generated")
    name: Task | None = Field(None, description="name of the set in files and tables; null: the source")
    n: Annotated[int, Field(ge=1)] | None = Field(None, description="conversations that are played; null: all")
    seed: Seed = Field(0, description="seed of the choice, or of the generated conversations")
    max_turns: Annotated[int, Field(ge=1)] | None = Field(
        None, description="the user's turns that are played; null: all, and 8 where generated"
    )
    max_tokens: int = Field(256, ge=1, description="longest answer in tokens")
    hold: bool = Field(
        True, description="policies that act each step hold their budget within a turn too; false: all at its end only"
    )
    answer_nll: bool = Field(
        True, description="score the answers under the full cache, in one more pass over each conversation"
    )
    controls: list[Literal["text_drop"]] = Field(
        [], description="controls that are no cache policies; text_drop deletes the text of old turns"
    )
    judge: Judge | None = Field(None, description="a language model that judges beside the rules; null: rules alone")

    @property
    def set(self) -> str:
        return self.name or self.source

    @model_validator(mode="after")
    def _complete(self) -> Chat:
        if self.source == "generated":
            if self.path:
                raise ValueError("path: generated conversations are in no file; leave it out or choose another source")
            if self.n is None:
                raise ValueError("n: say how many conversations are to be generated, such as 40")
        elif not self.path:
            raise ValueError(f"path: {self.source} needs the file of conversations, .json or .jsonl")
        return self


class Statistics(Section):
    confidence: float = Field(0.95, gt=0.5, lt=1, description="of every interval")
    resamples: int = Field(10000, ge=100, description="bootstrap resamples")
    seed: Seed = Field(0, description="seed of the bootstrap")


class Adaptive(Section):
    """More examples only where the transition is undecided."""

    enabled: bool = Field(False, description="true: examples are added to a bin in shards while it is undecided")
    start: int = Field(5, ge=1, description="examples in each bin at the first look")
    step: int = Field(5, ge=1, description="examples that an undecided bin gets at each look after it")
    cap: int = Field(40, ge=1, description="examples in a bin at most; fixes the looks and their levels")

    @model_validator(mode="after")
    def _room(self) -> Adaptive:
        if self.start > self.cap:
            raise ValueError(f"start: {self.start} is more than cap, {self.cap}; give at most that")
        return self

    @property
    def shards(self) -> list[tuple[int, int]]:
        """Where each shard begins in a bin's order of choice, and the place behind its end; as many as looks."""
        ends = [*range(self.start, self.cap, self.step), self.cap]
        return list(pairwise([0, *ends]))


class Report(Section):
    title: str | None = Field(None, description="title of the report; null: the experiment's name")
    sqlite: bool = Field(True, description="write kv_transition.sqlite as well")


class Output(Section):
    dir: str = Field("results", min_length=1, description="where everything generated goes")


class Hardware(Section):
    """What one GPU job asks of a cluster."""

    gpu_model: str = Field("a100", pattern=r"^[A-Za-z0-9_.-]+$", description="model of the GPU")
    runtime_min: int = Field(60, ge=1, description="minutes of the first attempt")
    mem_gb: int = Field(48, ge=1, description="host memory of the first attempt")


class Settings(Section):
    experiment: str = Field("demo", pattern=r"^[A-Za-z0-9_.-]+$", description="name of the results folder")
    dataset: Dataset | None = None
    binning: Binning = Binning()
    model: Model = Model()
    engine: Engine = Engine()
    prefill: Prefill = Prefill()
    kv: KV
    decoding: Decoding = Decoding()
    observe: Observe = Observe()
    perplexity: Perplexity | None = None
    chat: Chat | None = None
    statistics: Statistics = Statistics()
    adaptive: Adaptive = Adaptive()
    report: Report = Report()
    output: Output = Output()
    hardware: Hardware = Hardware()

    @property
    def tasks(self) -> list[str]:
        """Tasks that are answered; none in an experiment that is all perplexity or conversations."""
        return self.dataset.tasks if self.dataset else []

    @model_validator(mode="after")
    def _something_to_do(self) -> Settings:
        studies = ("dataset", "perplexity", "chat")
        if all(getattr(self, name, None) is None for name in studies):
            raise ValueError(f"dataset: this key is required, unless there is another of {', '.join(studies)}")
        return self

    @field_validator("experiment")
    @classmethod
    def _not_the_store(cls, name: str) -> str:
        if name in ("prefill", "models", ".", ".."):
            raise ValueError(f"{name!r} cannot be an experiment's name; that folder is taken")
        return name

    @field_validator("adaptive")
    @classmethod
    def _enough_chosen(cls, adaptive: Adaptive, info: ValidationInfo) -> Adaptive:
        chosen = info.data["binning"].n_per_bin if "binning" in info.data else adaptive.cap
        if adaptive.enabled and adaptive.cap > chosen:
            raise ValueError(
                f"cap: {adaptive.cap} is more than the {chosen} examples that binning.n_per_bin chooses in a bin; "
                "raise binning.n_per_bin or lower cap"
            )
        return adaptive


def parse(config: Mapping[str, Any]) -> Settings:
    """Validate a configuration. Raises UserError: one sentence naming the key and what it may be."""
    # A resolved experiment, as it lies beside its results, says what made it; so it can be run again as it is.
    sections = {key: value for key, value in _plain(config).items() if key != "provenance"}
    try:
        return Settings.model_validate(sections)
    except ValidationError as error:
        raise UserError(_sentence(error)) from None


def load(path: str | Path, overrides: list[str] | None = None) -> Settings:
    """Read an experiment file; it is whole, nothing is merged into it but ``key.sub=value`` overrides."""
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no experiment file {path}; see config/ for examples") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        raise UserError(f"{path} is not valid YAML{line}; see config/config.yaml for the form") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no mapping of keys; see config/config.yaml for the form")
    return parse(override(config, overrides or []))


def override(config: Mapping[str, Any], assignments: list[str]) -> dict[str, Any]:
    """A copy of the configuration with ``model.device=cpu``-like assignments applied; values are YAML."""
    result = _plain(config)
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator or not key:
            raise UserError(f"--set {assignment!r} is not of the form key.sub=value, such as model.device=cpu")
        *parents, last = key.split(".")
        section = result
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise UserError(f"--set {key}: {parent} is a value, not a section")
        try:
            section[last] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"--set {key}: {text!r} is not a YAML value") from None
    return result


def json_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of an experiment file."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Settings.model_json_schema()}


def _plain(value: Any) -> Any:
    """Nested mappings as plain dicts, so that the caller's object is never changed."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return value


def _allowed_keys(loc: tuple[int | str, ...]) -> str:
    section: type[BaseModel] = Settings
    parts = iter(loc[:-1])
    for part in parts:
        field = section.model_fields.get(str(part))
        kinds = [] if field is None else [field.annotation, *get_args(field.annotation)]
        sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not sections:
            return ""
        section = sections[0]
        if get_origin(field.annotation) is dict:
            next(parts, None)  # the name of a section
    return ", ".join(section.model_fields)


# What a key that takes one of several types may be; the library's message speaks of one type only.
_UNIONS = {
    r"^kv\.budgets\.\d+": "give a fraction in (0, 1] such as 0.2, or {tokens: n} with n of at least 1",
    r"^(decoding|observe)\.max_tokens": "give 'task' or a whole number of at least 1",
    r"^kv\.policies": "give name: {hyper-parameters}, the name of letters, digits, '_', '.' and '-'",
}


# What the library puts into a location for the member of a union, and for a mapping's key.
_UNION_MEMBER = re.compile(r"\[key\]|(constrained-)?(int|float)|TokenBudget|literal\[.*\]|function-.*\(.*\)")


def _sentence(error: ValidationError) -> str:
    # A union fails once per member; the deepest location is the member the user meant.
    first = max(error.errors(), key=lambda e: (e["type"] == "extra_forbidden", e["type"] == "value_error"))
    loc = tuple(part for part in first["loc"] if not _UNION_MEMBER.fullmatch(str(part)))
    key = ".".join(str(part) for part in loc) or "the configuration"
    kind, given = first["type"], first.get("input")
    for pattern, allowed in _UNIONS.items():
        if re.match(pattern, key):
            return f"{key}: {given!r} is not allowed; {allowed}"
    if kind == "extra_forbidden":
        return f"{key}: there is no such key; allowed here: {_allowed_keys(loc)}"
    if kind == "missing":
        return f"{key}: this key is required; see config/README.md"
    if kind == "value_error":
        text = str(first["ctx"]["error"])
        if not loc:
            return text
        # a validator of a section begins with the key inside it that is wrong
        inside = re.match(r"([\w.@-]+): ", text)
        return f"{key}.{text}" if inside else f"{key}: {text}"
    if kind == "literal_error":
        return f"{key}: {given!r} is not allowed; choose one of {first['ctx']['expected']}"
    if kind == "too_short":
        return f"{key}: give at least {first['ctx']['min_length']} entry, not {given!r}"
    if kind == "model_type":
        return f"{key}: this is a section of keys, not {given!r}; allowed in it: {_allowed_keys((*loc, ''))}"
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{key}: {message.replace('input should', 'it should')}, not {given!r}"
