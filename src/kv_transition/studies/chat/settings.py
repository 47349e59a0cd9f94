"""The configuration keys of the chat study."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from kv_transition.sections import EngineRequest, Section, Seed, Task, check_address, environment_name

TEXT_DROP = "text_drop"


class Judge(EngineRequest):
    """A language model that judges, in addition to the rules, whether answers follow instructions."""

    base_url: str = Field(description="address of an OpenAI-compatible endpoint, up to and including /v1")
    model: str = Field(min_length=1, description="name of the model at the endpoint")
    api_key_env: str | None = Field("OPENAI_API_KEY", description="environment variable with the key")
    max_tokens: int = Field(512, ge=16, description="maximum length of a verdict in tokens")

    @field_validator("api_key_env")
    @classmethod
    def _a_name(cls, name: str | None) -> str | None:
        return environment_name(name)

    @model_validator(mode="after")
    def _address(self) -> Judge:
        check_address("base_url", self.base_url)
        return self


class Chat(Section):
    """Conversations, played turn by turn on one growing cache that is compressed after each answer."""

    source: Literal["turns", "mt_bench", "mt_eval", "generated"] = Field(
        "generated", description="format of the conversations; generated: generated for the embedded follower"
    )
    path: str | None = Field(
        None, description="file of the conversations, .json or .jsonl, optionally with .gz; null for generated"
    )
    name: Task | None = Field(None, description="name of the set in files and tables; null: the source")
    n: Annotated[int, Field(ge=1, le=100_000)] | None = Field(
        None, description="number of conversations that are played; null: all"
    )
    seed: Seed = Field(0, description="seed of the choice, or of the generated conversations")
    max_turns: Annotated[int, Field(ge=1, le=10_000)] | None = Field(
        None, description="maximum number of user turns that are played; null: all, or 8 for generated"
    )
    max_tokens: int = Field(256, ge=1, description="maximum length of an answer in tokens")
    hold: bool = Field(
        True,
        description="true: policies that act at each step also do so within a turn; false: all act only at its end",
    )
    answer_nll: bool = Field(
        True, description="true: score the answers under the full cache, in an additional pass over each conversation"
    )
    controls: list[Literal["text_drop"]] = Field(
        [], description="controls that are not cache policies; text_drop deletes the text of old turns"
    )
    judge: Judge | None = Field(
        None, description="a language model that judges in addition to the rules; null: only rules"
    )

    @property
    def set(self) -> str:
        return self.name or self.source

    @model_validator(mode="after")
    def _complete(self) -> Chat:
        if self.source == "generated":
            if self.path:
                raise ValueError("path: generated conversations have no file; remove path, or choose another source")
            if self.n is None:
                raise ValueError("n: give the number of conversations to generate, such as 40")
        elif not self.path:
            raise ValueError(f"path: {self.source} needs the file of conversations, .json or .jsonl")
        return self


class Fields(Section):
    """The keys that conversations add to an experiment."""

    chat: Chat | None = None

    @model_validator(mode="after")
    def _controls_are_no_policies(self) -> Fields:
        for name, options in self.kv.policies.items():
            if options.get("kind", name) == TEXT_DROP:
                raise ValueError(
                    f"kv.policies.{name}: {TEXT_DROP} deletes text and is not a cache policy but a control of "
                    f"conversations; give chat.controls: [{TEXT_DROP}]"
                )
        return self
