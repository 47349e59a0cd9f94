"""Compare prompts with an independent implementation of LongBench's procedure."""

from __future__ import annotations

import gzip
import json

import pytest
from data_helpers import KVT_DATA, WORDS, needs_data, word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transition.data.prompts import PromptBuilder, Template, render_chat
from kv_transition.data.tokens import load_tokenizer, tokenizer_sha256
from kv_transition.errors import UserError

PLAIN_CHAT = "{% for m in messages %}<bos>[user] {{ m['content'] }}{% endfor %} [bot]"
STRIPPING_CHAT = "{% for m in messages %}<bos>[user] {{ m['content'] | trim }}{% endfor %} [bot]"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(str(word_tokenizer(tmp_path_factory.mktemp("plain"))))


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory):
    return load_tokenizer(str(word_tokenizer(tmp_path_factory.mktemp("chat"), PLAIN_CHAT)))


def builder(tokenizer, template="{context}\nQuestion : {input} Answer :", max_length=1000, chat=False):
    return PromptBuilder(tokenizer, Template.parse(template, "the template"), max_length, chat)


def words(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(ids)


class TestTemplate:
    def test_the_text_between_context_and_question_belongs_to_the_question(self):
        template = Template.parse("Read: {context}\n\nNow answer.\nQ: {input}\nA:", "t")
        assert template.fill("CCC", "QQQ") == ("Read: CCC", "\n\nNow answer.\nQ: QQQ\nA:")

    def test_without_a_question_the_tail_is_still_its_own_segment(self):
        template = Template.parse("{context}\nSummary:", "t")
        assert not template.has_question
        assert template.fill("CCC", "ignored") == ("CCC", "\nSummary:")

    def test_context_directly_followed_by_the_question(self):
        assert Template.parse("{context}{input}", "t").fill("CC", "QQ") == ("CC", "QQ")

    def test_braces_in_texts_and_literal_braces_are_left_alone(self):
        assert Template.parse('{{"a"}} {context} {input} }}{input}', "t").fill("{x}", "{0}") == (
            '{"a"} {x}',
            " {0} }{0}",
        )

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("no fields", "once"),
            ("{context} {context} {input}", "once"),
            ("{input} {context} end", "before any"),
            ("{context}", "after {context}"),
            ("{context} {question}", "{question}"),
            ("{context} {input", "not a template"),
            ("{context} {}", "only {context} and {input}"),
        ],
    )
    def test_other_forms_are_refused(self, text, message):
        with pytest.raises(UserError, match="my template") as error:
            Template.parse(text, "my template")
        assert message in str(error.value)


class TestSegments:
    def test_each_segment_is_tokenized_by_itself_with_one_bos(self, tokenizer):
        prompt = builder(tokenizer)("w1 w2 w3", "w4 ?")
        assert words(tokenizer, prompt.context_ids) == ["<bos>", "w1", "w2", "w3"]
        assert words(tokenizer, prompt.question_ids) == ["Question", ":", "w4", "?", "Answer", ":"]
        assert (prompt.token_len, prompt.prompt_len, prompt.truncated) == (10, 10, False)

    def test_a_word_across_the_boundary_is_two_tokens(self, tokenizer):
        prompt = builder(tokenizer, "{context}{input}")("w1", "0")
        assert words(tokenizer, prompt.context_ids + prompt.question_ids) == ["<bos>", "w1", "<unk>"]

    def test_the_hash_is_of_the_ids_and_the_boundary(self, tokenizer):
        one = builder(tokenizer)("w1 w2 w3", "w4 ?")
        same = builder(tokenizer, "{context}  Question : {input}\n\nAnswer :", max_length=77)("w1  w2\nw3", "w4 ?")
        shifted = builder(tokenizer, "{context} w3 Question : {input} Answer :")("w1 w2", "w4 ?")
        assert one.sha256 == same.sha256
        assert one.context_ids + one.question_ids == shifted.context_ids + shifted.question_ids
        assert one.sha256 != shifted.sha256


class TestChatTemplate:
    def test_it_wraps_both_segments_and_brings_its_own_bos(self, chat_tokenizer):
        prompt = builder(chat_tokenizer, chat=True)("w1 w2", "w4 ?")
        assert words(chat_tokenizer, prompt.context_ids) == ["<bos>", "[", "user", "]", "w1", "w2"]
        assert words(chat_tokenizer, prompt.question_ids)[:3] == ["Question", ":", "w4"]
        assert words(chat_tokenizer, prompt.question_ids)[-4:] == [":", "[", "bot", "]"]

    def test_texts_and_ids_agree(self, chat_tokenizer):
        prompt = builder(chat_tokenizer, chat=True)("w1 w2", "w4 ?")
        assert chat_tokenizer(prompt.context_text, add_special_tokens=False).input_ids == prompt.context_ids
        assert chat_tokenizer(prompt.question_text, add_special_tokens=False).input_ids == prompt.question_ids

    def test_a_template_that_strips_keeps_the_boundary(self, tmp_path):
        tokenizer = load_tokenizer(str(word_tokenizer(tmp_path, STRIPPING_CHAT)))
        head, tail = render_chat(tokenizer, "\n  w1 w2 \n", "\n w3 \n\n")
        assert (head, tail) == ("<bos>[user] w1 w2 \n", "\n w3 [bot]")

    @pytest.mark.parametrize("strips", ["", " | trim"])
    def test_the_message_is_found_in_its_template(self, tmp_path, strips):
        template = "<s>system : be short <user>{{ messages[0].content" + strips + " }} <assistant>"
        tokenizer = load_tokenizer(str(word_tokenizer(tmp_path, template)))
        template = "{context}\nQuestion : {input} "
        for chat in (True, False):
            prompt = builder(tokenizer, template, chat=chat)("a b c", "who ?")
            start, end = prompt.content
            content = prompt.context_text[start:] + prompt.question_text[:end]
            assert content.strip() == "a b c\nQuestion : who ?"
            messages = [{"role": "user", "content": content}]
            whole = tokenizer.apply_chat_template(messages, tokenize=False) if chat else content
            assert whole == prompt.context_text + prompt.question_text

    def test_a_message_that_its_template_rewrites_is_not_found(self, tmp_path):
        tokenizer = load_tokenizer(str(word_tokenizer(tmp_path, "<user>{{ messages[0].content | upper }}<assistant>")))
        assert builder(tokenizer, chat=True)("a b c", "who ?").content is None

    @pytest.mark.parametrize("template", ["{{ raise_exception('no users here') }}", "{{ messages[0].nothing.at.all }}"])
    def test_a_failing_template_is_one_sentence(self, tmp_path, template):
        tokenizer = load_tokenizer(str(word_tokenizer(tmp_path, template)))
        with pytest.raises(UserError, match="chat_template"):
            render_chat(tokenizer, "w1", "w2")

    def test_a_template_that_loses_the_text_is_refused(self, tmp_path):
        tokenizer = load_tokenizer(str(word_tokenizer(tmp_path, "{{ messages[0]['content'] | length }}")))
        with pytest.raises(UserError, match="changes the text"):
            render_chat(tokenizer, "w1", "w2")

    def test_truncation_comes_before_the_template(self, chat_tokenizer):
        prompt = builder(chat_tokenizer, "{context} {input}", max_length=6, chat=True)("w1 w2 w3 w4 w5 w6 w7", "w8")
        # <bos> counts in the first half of three tokens; the template's own four tokens and its three at the end do not
        fed = words(chat_tokenizer, prompt.context_ids + prompt.question_ids)
        assert fed == ["<bos>", "[", "user", "]", "w1", "w2", "w6", "w7", "w8", "[", "bot", "]"]
        assert prompt.token_len == 4 + 7 + 1 + 3


class TestTruncation:
    @given(
        context=st.lists(st.sampled_from(WORDS), min_size=1, max_size=60),
        question=st.lists(st.sampled_from(WORDS), min_size=1, max_size=12),
        max_length=st.integers(4, 80),
    )
    @settings(deadline=None)
    def test_first_and_last_half_of_the_tokens_stay(self, tokenizer, context, question, max_length):
        prompt = builder(tokenizer, "{context} | {input}", max_length)(" ".join(context), " ".join(question))
        whole = ["<bos>", *context, "<unk>", *question]
        n_context = 1 + len(context)
        half = max_length // 2
        kept = list(range(len(whole)))
        if len(whole) > max_length:
            kept = kept[:half] + kept[-half:]
        assert words(tokenizer, prompt.context_ids) == [whole[i] for i in kept if i < n_context]
        assert words(tokenizer, prompt.question_ids) == [whole[i] for i in kept if i >= n_context]
        assert prompt.token_len == len(whole)
        assert prompt.truncated == (len(whole) > max_length)
        assert prompt.question_cut == (sum(i >= n_context for i in kept) < len(whole) - n_context)

    def test_the_text_is_cut_and_not_decoded(self, tokenizer):
        prompt = builder(tokenizer, "{context}\n{input}", max_length=6)("w1  w2,w3 (w4)  w5\n\nw6 w7", "w8")
        assert prompt.context_text + prompt.question_text == "w1  w2 w6 w7\nw8".replace(" w6", "\n\nw6")

    def test_special_tokens_written_in_the_text_are_dropped_with_the_middle(self, tokenizer):
        build = builder(tokenizer, "{context} {input}", max_length=8)
        short = build("w1 <eos> w2", "w3")
        assert "<eos>" in short.context_text
        long = build("w1 <eos> w2 w3 w4 w5 w6 w7", "w8 <pad> w9")
        fed = words(tokenizer, long.context_ids + long.question_ids)
        assert fed == ["<bos>", "w1", "w2", "w7", "w8", "w9"]


def read(task, limit):
    with gzip.open(KVT_DATA / "longbench" / f"{task}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for _, line in zip(range(limit), lines, strict=False)]


@pytest.fixture(scope="module")
def qwen():
    return load_tokenizer(str(KVT_DATA / "tokenizers" / "qwen2.5"))


@needs_data
@pytest.mark.parametrize(("task", "max_length"), [("hotpotqa", 1000), ("narrativeqa", 501), ("multifieldqa_en", 2048)])
def test_truncation_equals_decoding_on_real_text(qwen, task, max_length):
    """Compare with decode() up to a character split over two tokens, which decode() replaces by U+FFFD."""
    template = json.loads((KVT_DATA / "longbench/config/dataset2prompt.json").read_text(encoding="utf-8"))[task]
    build = builder(qwen, template, max_length)
    n_truncated = 0
    for record in read(task, 8):
        filled = template.format(**record)
        ids = qwen(filled, verbose=False).input_ids
        segments = build.template.fill(record["context"], record["input"])
        assert "".join(segments) == filled
        cut = build.truncate(*segments)
        assert (cut is not None) == (len(ids) > max_length)
        if cut is None:
            continue
        n_truncated += 1
        half = max_length // 2
        head = qwen.decode(ids[:half], skip_special_tokens=True).rstrip("\ufffd")
        tail = qwen.decode(ids[-half:], skip_special_tokens=True).lstrip("\ufffd")
        ours = cut[0] + cut[1]
        assert ours.startswith(head)
        assert ours.endswith(tail)
        assert len(ours) <= len(head) + len(tail) + 1
        assert cut[1] == segments[1]
    assert n_truncated


@needs_data
@pytest.mark.parametrize("name", ["tokenizers/qwen2.5", "tokenizers/mistral"])
def test_real_chat_templates_keep_text_and_boundary(name):
    tokenizer = load_tokenizer(str(KVT_DATA / name))
    record = read("hotpotqa", 1)[0]
    template = Template.parse("Read.\n{context}\n\nQuestion: {input}\nAnswer:", "t")
    context, question = template.fill(record["context"], record["input"])
    head, tail = render_chat(tokenizer, context, question)
    messages = [{"role": "user", "content": context + question}]
    assert head + tail == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert head.endswith(record["context"])
    assert question in tail
    prompt = PromptBuilder(tokenizer, template, 100_000, chat=True)(record["context"], record["input"])
    whole = tokenizer(head + tail, add_special_tokens=False, verbose=False).input_ids
    # only tokens at the boundary may differ from those of the whole text
    assert abs(len(whole) - prompt.prompt_len) <= 3


class TestTokenizer:
    def test_a_sub_folder_is_used_as_it_is_whatever_the_model_type(self, tmp_path):
        word_tokenizer(tmp_path)
        (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
        tokenizer = load_tokenizer(str(tmp_path))
        assert words(tokenizer, tokenizer("w1 w2").input_ids) == ["<bos>", "w1", "w2"]

    def test_a_class_that_gives_other_ids_is_refused(self, tmp_path):
        word_tokenizer(tmp_path)
        for file in (tmp_path / "tokenizer").iterdir():
            file.rename(tmp_path / file.name)
        (tmp_path / "tokenizer").rmdir()
        (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
        with pytest.raises(UserError, match=r"model\.name: .*tokenizer"):
            load_tokenizer(str(tmp_path))

    def test_no_tokenizer_is_one_sentence(self, tmp_path):
        (tmp_path / "tokenizer").mkdir()
        with pytest.raises(UserError, match="in this folder"):
            load_tokenizer(str(tmp_path))

    def test_the_hash_is_of_the_content(self, tmp_path):
        first = load_tokenizer(str(word_tokenizer(tmp_path / "a")))
        moved = load_tokenizer(str(word_tokenizer(tmp_path / "b")))
        chatty = load_tokenizer(str(word_tokenizer(tmp_path / "c", PLAIN_CHAT)))
        assert tokenizer_sha256(first) == tokenizer_sha256(moved) != tokenizer_sha256(chatty)
