"""Korean inflection by syllable arithmetic: particles that agree, predicates that conjugate.

A Hangul syllable is ``0xAC00 + (initial * 21 + vowel) * 28 + final``, so every sound change of the grammar is
arithmetic on three small numbers. An ending is named by its form after a stem that changes nothing, and its first
letter says which of three families it belongs to:

* ``아…`` (``아서``, ``았다``): vowel harmony chooses 아 or 어, then vowels contract (보 + 았다 → 봤다);
* ``으…``, ``은…``, ``을…``, ``음`` (``으면``, ``은``, ``을``): the 으 goes after a vowel or ㄹ;
* everything else begins with a consonant (``고``, ``지만``) and only a final ㄹ before ㄴ or ㅅ gives way.

Three endings also depend on whether the predicate describes or acts: ``는다`` (먹는다, 간다, but 크다), ``는`` (먹는,
but 큰) and ``는데``; ``습니다`` becomes ㅂ니다 after a vowel.
"""

from __future__ import annotations

_FIRST, _LAST = 0xAC00, 0xD7A3
_VOWELS = "ㅏㅐㅑㅒㅓㅔㅕㅖㅗㅘㅙㅚㅛㅜㅝㅞㅟㅠㅡㅢㅣ"
_FINALS = " ㄱㄲㄳㄴㄵㄶㄷㄹㄺㄻㄼㄽㄾㄿㅀㅁㅂㅄㅅㅆㅇㅈㅊㅋㅌㅍㅎ"
_IEUNG = 11  # the silent initial
# Final consonants of the digits as they are read aloud: 영 일 이 삼 사 오 육 칠 팔 구.
_DIGIT_FINALS = dict(zip("0123456789", "ㅇㄹ ㅁ  ㄱㄹㄹ ", strict=True))
# What a final 아/어 makes of an open stem's vowel; None keeps both syllables apart.
_CONTRACTIONS = {
    ("ㅏ", "ㅏ"): "ㅏ",
    ("ㅓ", "ㅓ"): "ㅓ",
    ("ㅐ", "ㅓ"): "ㅐ",
    ("ㅔ", "ㅓ"): "ㅔ",
    ("ㅕ", "ㅓ"): "ㅕ",
    ("ㅗ", "ㅏ"): "ㅘ",
    ("ㅜ", "ㅓ"): "ㅝ",
    ("ㅣ", "ㅓ"): "ㅕ",
    ("ㅚ", "ㅓ"): "ㅙ",
}
_PAIRS = {
    "은": ("은", "는"),
    "이": ("이", "가"),
    "을": ("을", "를"),
    "과": ("과", "와"),
    "으로": ("으로", "로"),
    "으로는": ("으로는", "로는"),
    "이나": ("이나", "나"),
    "이라는": ("이라는", "라는"),
    "이라고": ("이라고", "라고"),
    "이랑": ("이랑", "랑"),
    "아": ("아", "야"),
}
IRREGULARITIES = ("", "ㅂ", "ㄷ", "ㅅ", "ㅎ", "르")


def split(syllable: str) -> tuple[int, str, str]:
    """Take a Hangul syllable apart into (index of the initial, vowel, final or ``" "``)."""
    code = ord(syllable) - _FIRST
    assert 0 <= code <= _LAST - _FIRST, syllable
    return code // 588, _VOWELS[code // 28 % 21], _FINALS[code % 28]


def join(initial: int, vowel: str, final: str = " ") -> str:
    """Put a syllable together; the inverse of :func:`split`."""
    return chr(_FIRST + (initial * 21 + _VOWELS.index(vowel)) * 28 + _FINALS.index(final))


def final_of(word: str) -> str:
    """The final consonant with which a word ends when read aloud, ``" "`` for none or for a foreign letter."""
    last = word.rstrip("'\"”’」』》)")[-1:]
    if last and _FIRST <= ord(last) <= _LAST:
        return split(last)[2]
    return _DIGIT_FINALS.get(last, " ")


def particle(word: str, form: str) -> str:
    """The word with a particle that agrees with its final consonant.

    Args:
        word: a noun, possibly ending in a digit or a closing quotation mark.
        form: the particle as it stands after a consonant (``은 이 을 과 으로 이나 …``); one that never changes
            (``에서``, ``의``, ``도``) is appended as it is.
    """
    after_consonant, after_vowel = _PAIRS.get(form, (form, form))
    final = final_of(word)
    open_end = final == " " or (final == "ㄹ" and form.startswith("으로"))
    return word + (after_vowel if open_end else after_consonant)


def copula(noun: str, ending: str) -> str:
    """The noun with 이다 in the given ending, e.g. ``("나무", "았다")`` → 나무였다, ``("책", "아요")`` → 책이에요."""
    closed = final_of(noun) != " "
    if ending == "아요":
        return noun + ("이에요" if closed else "예요")
    if ending.startswith("았"):
        return noun + ("이었" if closed else "였") + _after_past(ending[1:])
    if ending == "아":
        return noun + ("이야" if closed else "야")
    if ending.startswith("아"):
        return noun + ("이어" if closed else "여") + ending[1:]
    if ending in ("는다", "다"):
        return noun + ("이다" if closed else "다")
    if ending == "는다고":
        return noun + ("이라고" if closed else "라고")
    if ending == "습니다":
        return noun + "입니다"
    if ending in ("는", "은"):
        return noun + "인"
    if ending == "을":
        return noun + "일"
    if ending in ("는데", "은데"):
        return noun + "인데"
    linked = ending[1:] if ending.startswith("으") else ending
    return noun + ("이" if closed else "") + linked


def conjugate(stem: str, ending: str, irregularity: str = "", descriptive: bool = False) -> str:
    """Inflect a predicate.

    Args:
        stem: the dictionary form without 다.
        ending: as in the module's docstring, named by its form after a regular closed stem.
        irregularity: one of :data:`IRREGULARITIES`; 하다, 으 and ㄹ stems need none, they are seen from the stem.
        descriptive: True for adjectives (형용사), which take no 는다 or 는.
    """
    assert irregularity in IRREGULARITIES, irregularity
    existential = stem.endswith(("있", "없"))
    if ending.startswith("는다"):
        if descriptive or existential:
            return stem + ending[1:]
        return _open_or(stem, "ㄴ", ending[1:], "는")
    if ending in ("는", "는데", "는데요", "는지") and descriptive and not existential:
        return conjugate(stem, "은" + ending[1:], irregularity)
    if ending.startswith("습니"):
        return _open_or(stem, "ㅂ", ending[1:], "습")
    if ending[0] in "아았":
        return _harmonic(stem, ending, irregularity)
    if ending[0] in "으은을음":
        return _linking(stem, ending, irregularity)
    if split(stem[-1])[2] == "ㄹ" and ending[0] in "나네는니":
        return _with_final(stem, " ") + ending
    return stem + ending


def _with_final(stem: str, final: str) -> str:
    initial, vowel, _ = split(stem[-1])
    return stem[:-1] + join(initial, vowel, final)


def _open_or(stem: str, final: str, rest: str, closed_form: str) -> str:
    """``final`` under an open (or ㄹ) last syllable, else the syllable ``closed_form`` behind it."""
    if split(stem[-1])[2] in " ㄹ":
        return _with_final(stem, final) + rest
    return stem + closed_form + rest


def _after_past(rest: str) -> str:
    """Endings behind 았/었: vowel harmony always chooses 어, and 으 stays."""
    return "어" + rest[1:] if rest.startswith("아") else rest


def _soften(stem: str, irregularity: str, before_harmonic: bool) -> str:
    """The stem as it stands before a vowel when its final consonant is irregular."""
    match irregularity:
        case "ㅂ":
            # Only 돕다 and 곱다 keep 오 before 아; all the others have 우.
            vowel = "오" if before_harmonic and stem[-1] in "돕곱" else "우"
            return _with_final(stem, " ") + vowel
        case "ㄷ":
            return _with_final(stem, "ㄹ")
        case _:
            return _with_final(stem, " ")


def _harmonic(stem: str, ending: str, irregularity: str) -> str:
    past = ending[0] == "았"
    rest = _after_past(ending[1:]) if past else ending[1:]
    initial, vowel, final = split(stem[-1])
    head = stem[:-1]
    if stem[-1] == "하":
        fused = head + join(initial, "ㅐ")
    elif irregularity == "르":
        before = head[-1]
        tail = "라" if split(before)[1] in "ㅏㅗ" else "러"
        fused = _with_final(head, "ㄹ") + tail
    elif irregularity == "ㅎ":
        fused = head + join(initial, "ㅐ" if vowel in "ㅏㅓ" else "ㅒ")
    elif irregularity == "ㅂ":
        softened = _soften(stem, "ㅂ", True)
        fused = softened[:-1] + ("와" if softened[-1] == "오" else "워")
    elif irregularity:
        fused = _soften(stem, irregularity, True) + ("아" if vowel in "ㅏㅗ" else "어")
    elif final != " ":
        fused = stem + ("아" if vowel in "ㅏㅑㅗ" else "어")
    elif vowel == "ㅡ":
        bright = bool(head) and split(head[-1])[1] in "ㅏㅗ"
        fused = head + join(initial, "ㅏ" if bright else "ㅓ")
    else:
        harmony = "ㅏ" if vowel in "ㅏㅗ" else "ㅓ"
        contracted = _CONTRACTIONS.get((vowel, harmony))
        fused = head + join(initial, contracted) if contracted else stem + "어"
    return (_with_final(fused, "ㅆ") if past else fused) + rest


def _linking(stem: str, ending: str, irregularity: str) -> str:
    if irregularity in ("ㅂ", "ㄷ", "ㅅ"):
        softened = _soften(stem, irregularity, False)
        if irregularity == "ㅂ":
            return _linking(softened, ending, "")
        return softened + ending
    if irregularity == "ㅎ":
        stem = _with_final(stem, " ")
    final = split(stem[-1])[2]
    if final not in " ㄹ":
        return stem + ending
    under = {"은": "ㄴ", "을": "ㄹ", "음": "ㅁ"}.get(ending[0])
    if under:
        kept = "ㄻ" if under == "ㅁ" and final == "ㄹ" else under
        return _with_final(stem, kept) + ending[1:]
    if final == "ㄹ" and ending[1] in "니시":
        stem = _with_final(stem, " ")
    return stem + ending[1:]
