"""Generates the texts of all cases: the same bytes on every machine, in four languages and seven file formats."""

from __future__ import annotations

import gzip
import json
import random
import string
import unicodedata
from collections.abc import Sequence
from pathlib import Path

FREQUENT = (
    "the of and to a in that it was he for on with as his they at be this from had not are but or by one her which you "
    "were all she there would their we him been has when who will more no if out so said what up its about into than "
    "them can only other new some could time these two may then do first any my now such like our over man me even "
    "most made after also did many before must through back years where much your way well down should because each "
    "just river winter captain harbour letter garden mountain window village morning soldier kitchen silver bridge "
    "forest"
)
SYLLABLES = "ba ken ro mi sta lor ve ter ing na pol du sha gre ti mor al fen cu ri bo lan"
CHINESE = (
    "小明硕士毕业于中国科学院计算所，后在日本京都大学深造。", "今天的天气很好，我们一起去公园散步吧！",
    "他在图书馆里读了一整天的历史书。", "这座城市的交通非常方便，地铁可以到达每一个角落。",
    "明天早上八点，经理要在会议室开会。", "妈妈做的红烧肉是我最喜欢吃的菜，你呢？",
    "科学家发现了一种新的材料，它比钢铁更轻。", "春天来了，花园里的桃花都开了。",
)  # fmt: skip
JAPANESE = (
    "明日は公園でTシャツを着て、国家公務員の本を読みました。", "東京の夏はとても暑いですが、海へ行くと涼しいです。",
    "彼女は大学で日本文学を研究している。", "電車が遅れたので、会議に間に合いませんでした。",
    "新しいコンピューターを買ったら、仕事が速くなった。", "猫が窓の外を静かに見ています。",
    "先生は学生たちに難しい問題を出した。", "山の上から見る景色は本当に美しいですね！",
)  # fmt: skip
KOREAN = (
    "오늘은 날씨가 아주 좋아서 공원에 산책을 갔다.", "그는 도서관에서 하루 종일 역사책을 읽었습니다.",
    "서울의 지하철은 매우 편리해요.", "어머니가 만드신 김치찌개가 제일 맛있다.그는 웃었다.",
    "내일 아침 여덟 시에 회의가 있습니까?", "새로운 기술이 우리의 생활을 바꾸고 있다!",
    "봄이 오면 꽃이 핀다.", "학생들은 어려운 문제를 함께 풀었다.",
)  # fmt: skip
# Abbreviations, list numbers, combining accents, a joiner, two scripts in one sentence, a control character.
MIXED = (
    'Dr. Smith (b. 1950) paid $3.50 at No. 5, didn\'t he? "Yes!" he said… 1. Introduction\nU.S. e\u0301te\u0301 \u200d '
    "naïve — 漢字とkana. 한국어다.그는 갔다。終わり！ \ufffd \x07 end"
)


def lexicon(seed: int) -> list[str]:
    """Returns frequent English words, then some hundred invented ones."""
    draw, syllables = random.Random(seed), SYLLABLES.split()
    invented = ["".join(syllables[int(draw.random() * len(syllables))] for _ in range(2 + k % 3)) for k in range(600)]
    return [*FREQUENT.split(), *dict.fromkeys(invented)]


def documents(count: int, seed: int) -> list[str]:
    """Returns English-like documents of 2 to 12 sentences, some of several lines.

    Only `random()` is drawn: its sequence is the same in every Python version.
    """
    draw, words = random.Random(seed), lexicon(3)
    result: list[str] = []
    for number in range(count):
        sentences: list[str] = []
        for _ in range(2 + int(draw.random() * 11)):
            chosen = [words[int(len(words) * draw.random() ** 2.5)] for _ in range(4 + int(draw.random() * 12))]
            if draw.random() < 0.3:
                chosen[len(chosen) // 2] += ","
            if draw.random() < 0.1:
                chosen.insert(1, ("Dr. Smith", "No. 5", "3.14", "café", "U.S.", "it's")[int(draw.random() * 6)])
            sentences.append(" ".join([chosen[0].capitalize(), *chosen[1:]]) + ".!?"[int(draw.random() ** 4 * 3)])
        result.append(("\n" if number % 9 == 4 else " ").join(sentences))
    return result


def play() -> str:
    """Returns the text of tests/training/test_golden.py."""
    alphabet = "\n !$&',-.3:;?" + string.ascii_uppercase + string.ascii_lowercase
    words = ["king", "Rome", "speak", "citizen", "hear", "mine", "what", "Zounds", "quick", "joy", "vex", "And", "But"]
    return "".join(
        f"{alphabet[i * 5 % 65]} {words[i % 13]} {words[i * 7 % 13]}, "
        f"{words[i * i % 13]}; {alphabet[(i * 3 + 1) % 65]}.\n"
        for i in range(1600)
    )


def paragraphs(sentences: Sequence[str], separator: str) -> str:
    """Returns 130 documents made from eight sentences."""
    return "\n\n".join(
        separator.join(sentences[(i * 3 + j * j + i // 8) % 8] for j in range(2 + i % 5)) for i in range(130)
    )


def table(rows: Sequence[str], separator: str) -> str:
    """Returns a CSV or TSV file with a number and a text in each row."""
    quoted = [f'{number}{separator}"' + row.replace('"', '""') + '"' for number, row in enumerate(rows)]
    return "\n".join([f"number{separator}text", *quoted]) + "\n"


def write_texts(folder: Path) -> dict[str, Path]:
    """Writes all texts and returns their paths by name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    rows, other = documents(160, seed=1), documents(60, seed=2)
    prose = "\n\n".join(rows) + "\n"
    texts = {
        "prose.txt": prose, "other.txt": "\n\n".join(other) + "\n", "more.txt": "\n\n".join(documents(12, 9)) + "\n",
        "play.txt": play(), "duplicates.txt": "\n\n".join([*rows[:80], *rows[20:120], MIXED, MIXED]) + "\n",
        "jsonl.jsonl": "".join(json.dumps({"text": row, "n": n}) + "\n" for n, row in enumerate(rows)),
        "nested-jsonl.jsonl": "".join(json.dumps({"body": {"text": row}}) + "\n" for row in rows),
        "csv.csv": table(rows, ","), "tsv.tsv": table(rows, "\t"),
        "chinese.txt": paragraphs(CHINESE, ""), "japanese.txt": paragraphs(JAPANESE, ""),
        "korean.txt": paragraphs(KOREAN, " "),
    }  # fmt: skip
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode())
    (folder / "broken.txt").write_bytes(prose.encode()[:20_000] + b"\xff\xfe broken \xe2\x82 here\n\n" + b"word " * 50)
    (folder / "gz.txt.gz").write_bytes(gzip.compress(prose.encode(), mtime=0))
    pq.write_table(pa.table({"number": list(range(len(rows))), "text": rows}), folder / "parquet.parquet")
    (folder / "folder").mkdir()
    for number in range(6):
        part = "\n\n".join(documents(40, seed=20 + number))
        (folder / "folder" / f"{number}.txt").write_bytes(unicodedata.normalize("NFD", f"{part}\n\n{MIXED}\n").encode())
    return {path.name.partition(".")[0]: path for path in folder.iterdir()}
