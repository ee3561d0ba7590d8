"""Wikitext traps of real pages, one case each, and what must hold for any text at all."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daramgpt.corpora.brackets import mend_brackets
from daramgpt.corpora.wikitext import plain_lines


class Counts:
    """The part of a reading that the module uses."""

    def __init__(self) -> None:
        self.cleaned = Counter[str]()

    def count(self, rule: str, times: int = 1) -> None:
        self.cleaned[rule] += times


def plain(wikitext: str) -> tuple[str, Counter[str]]:
    counts = Counts()
    lines = plain_lines(counts, wikitext)  # type: ignore[arg-type]
    return "\n".join(" ".join(line.split()) for line in lines), counts.cleaned


@pytest.mark.parametrize(
    ("wikitext", "expected"),
    [
        # Templates
        (
            "{{정보상자 인물\n| 이름 = 홍길동\n| 배우자 = {{결혼|이|[[1990년]]}}\n| 표 =\n{|\n| 칸\n|}\n}}\n본문이다.",
            "본문이다.",
        ),
        ("[[서울|{{lang|en|Seoul}} 시]]와 [[파일:a.png|섬네일|{{출처|[[책|글]]}} 설명]]강", "Seoul 시와 강"),
        ("{{lang|ja|日本}}과 {{언어|en|Korea}}, {{LANG|fr|''État''|italic=no}}", "日本과 Korea, État"),
        ("서울({{llang|en|Seoul}}, 1924년 ~ )은", "서울(1924년 ~)은"),
        ("서울({{lang-en|Seoul}})은", "서울은"),
        ("{{국기|대한민국}} 선수와 {{나라|일본|크기=20px}} 감독", "대한민국 선수와 일본 감독"),
        ("{{nowrap|1=3월 1일}}과 {{줄바꿈 없음|한 줄}}", "3월 1일과 한 줄"),
        ("{{인용문|나는 [[자유]]다.|홍길동}}", "나는 자유다."),
        ("{{글자 색|red|붉은}} 글", "붉은 글"),
        ("앞 {{{1|기본}}} 뒤 {{{이름}}} 끝", "앞 기본 뒤 끝"),
        ("{{{{{틀}}}}}본문과 {{틀|{{{1|}}}}}", "본문과"),
        ("{{PAGENAME}}과 {{CURRENTYEAR}}년 {{#if:{{{1|}}}|예|아니오}} {{DEFAULTSORT:홍, 길동}}끝", "과 년 끝"),
        ("{{ 출처 필요 }}이다. {{ 다른 뜻 }}\n{{ reflist }}\n글{{ clear }}", "이다.\n글"),
        ("{{f(x)}}\n{{ f(x) }}\n{{will.i.am}}는 {{Mr. Mr.}} 가수", "는 가수"),
        ("글{{틀\n|a={{b\n|c}}\n}}자", "글자"),
        # Braces that are text
        ("값은 {{ message }}로, 곱은 {{ count * 2 }}로 쓴다", "값은 {{ message }}로, 곱은 {{ count * 2 }}로 쓴다"),
        ("{{ item.name }} 또는 {{ ok ? 'YES' : 'NO' }}", "{{ item.name }} 또는 {{ ok ? 'YES' : 'NO' }}"),
        ("<code>{{x}}</code>와 <code>{{lang|en|y}}</code>", "{{x}}와 y"),
        ("글자 {{ 와 }}, '{{' 나 '}}'는", "글자 {{ 와 }}, '{{' 나 '}}'는"),
        ("<nowiki>[[고리]], ''글'', {{틀}}</nowiki>과 <nowiki/>[[링크]]", "[[고리]], ''글'', {{틀}}과 링크"),
        # Notes
        ('가<ref name=x />나<ref name="y"/>다<ref>[[라]]</ref>마', "가나다마"),
        ("{{정보상자|값=1<ref>{{웹 인용|url=a}}</ref>}}글", "글"),
        ("가<ref>책\n나는 글\n다<ref>라</ref>마", "가책\n나는 글\n다마"),
        ("가<REF>나</Ref>다<ref\nname=z>라</ref>", "가다"),
        ("앞<ref>열림", "앞열림"),
        ("글(<ref>주</ref>)과 식(<math>x</math>, y)", "글과 식(y)"),
        # Other elements
        ("가<!-- 나\n다 -->라<!-- 끝", "가라"),
        ("<!-- 가 -->== 각주 ==\n가\n== 나 ==\n다(<!-- 라 -->), 라(마, <!-- 바 -->)", "다, 라(마)"),
        ("<gallery>\n파일:a.jpg|[[설명]]\n</gallery>글", "글"),
        ("<math>\\frac{{a}}{b}</math>는 값", "는 값"),
        ("<syntaxhighlight lang=py>\nx = {{}}\n</syntaxhighlight>글<source>a</source>", "글"),
        ("<source>.end()를 부른다", "<source>.end()를 부른다"),
        ("첫 줄<br />둘째<br>* 셋째", "첫 줄\n둘째\n셋째"),
        ("<table><tr><td>칸</td></tr></table>글", "글"),
        ("a<b, a==b, a>b와 <module>, x<source>y", "a<b, a==b, a>b와 <module>, x<source>y"),
        ("&lt;ref&gt;는&#10;태그, 가&nbsp;나, &amp;amp;, &#91;&#91;글&#93;&#93;", "<ref>는 태그, 가 나, &amp;, [[글]]"),
        # Links
        ("[[파일:a.jpg|섬네일|설명 [[링크]] 있음]]글[[그림:b.png]][[File:c.svg|20px]]", "글"),
        ("[[:분류:도시]]와 [[:en:Seoul|영어]] [[분류:도시|가]] [[ja:ソウル]] [[zh-min-nan:Seoul]]", "분류:도시와 영어"),
        ("[[서울 (동음이의)|]]과 [[위키백과:대문|]]", "서울과 대문"),
        ("[[ko:서울]]과 [[wikt:물|물]]", "ko:서울과 물"),
        ("[[서울]]에서 [[서울#역사|역사]]를 [[배우다|배우]]고", "서울에서 역사를 배우고"),
        ("[mailto:a@b.c 편지], [//a.b 곳], [https://a.b] 글([https://a.b])", "편지, 곳, 글"),
        ("[[https://a.b 누리집]]", "누리집"),
        ("배열 [1, 2]와 [[]]와 [[1, 2], [3]]", "배열 [1, 2]와 [[]]와 [[1, 2], [3]]"),
        # Lines
        ("'''굵은''' ''기운'' '''''둘 다''''' 글", "굵은 기운 둘 다 글"),
        ("f('')와 bind(('', 80))와 x = ''", "f('')와 bind(('', 80))와 x ="),
        ("빈 글은 ''이다", "빈 글은 ''이다"),
        ("''기운<br/>글''", "기운\n글"),
        ("; 용어 : 뜻\n: 풀이\n** 안\n*# 번호\n#* 점", "용어 : 뜻\n풀이\n안\n번호\n점"),
        ("-1은 수, --flag, a: b", "-1은 수, --flag, a: b"),
        ("__목차__\n__NOTOC__글 __init__, __FILE__\n__숨은분류__", "글 __init__, __FILE__"),
        ("-{zh-hans:汉;zh-hant:漢}-와 e^{-{a}}", "汉와 e^{-{a}}"),
        ("글 {{틀}}. 다음 {{틀}}, 끝", "글. 다음, 끝"),
        ("《{{lang-en|A}}》 글 「[[파일:a.jpg]]」", "글"),
        # Tables
        ("{|\n| a || {| 안 |\n{|\n! b\n|}\n|}\n글", "글"),
        (":{| class=x\n| 칸\n:|}\n::  {|\n|가\n|}\n글", "글"),
        ("{|\n| a {| b |} c || d |}\n|}\n글", "글"),
        ("줄 안의 {|x|} 값", "줄 안의 {|x|} 값"),
        ("{| class=x\n! 가 !! 나\n|-\n| 1 || 2\n\n남은 글", "남은 글"),
        # Sections
        ("앞\n==같이 보기==\n* 가\n==  [[각주]]  ==\n나\n== 뒤 ==\n다", "앞\n다"),
        ("앞\n== '''외부 링크''' ==  \n* 가\n=== 아래 ===\n나", "앞"),
        ("앞\n== [[문서|참고 문헌]] ==\n* 가\n== 5. 뒤 ==\n다", "앞\n다"),
        ("앞\n=== 출처 ===\n가\n=== 역사 ===\n나\n== External links ==\n다", "앞\n나"),
        ("앞\n= 제목 =\n나\n== 각주의 역사 ==\n다\n= 1 더하기 2", "앞\n나\n다\n= 1 더하기 2"),
    ],
)
def test_trap(wikitext: str, expected: str) -> None:
    assert plain(wikitext)[0] == expected


@pytest.mark.parametrize(
    ("wikitext", "counted"),
    [
        ("열린 {{틀과 [[고리", {"unbalanced mark kept": 2}),
        ("닫힌 틀}}과 고리]]와 표|}", {"unbalanced mark kept": 3}),
        ("{{틀 [[고리}} 글", {"unbalanced mark kept": 1}),
        ("[[0, 1], [2]]", {"double brackets kept as text": 1}),
        ("값 {{ a.b }}와 <code>{{c}}{{d}}</code>", {"double braces kept as text": 3}),
        ("열린 {{틀|값\n|}", {"unbalanced mark kept": 2, "line of an unbalanced table dropped": 1}),
        ("값 {|x|}", {"unbalanced mark kept": 1}),
        ("{|\n| 칸\n글", {"unbalanced mark kept": 1, "line of an unbalanced table dropped": 2}),
        ("빈 글 ''", {"quotes kept as text": 1}),
        ("'''[[다]]'''{{lang|en|된}}<ref>글</ref>\n{|\n|}", {}),
    ],
)
def test_what_is_kept_is_counted(wikitext: str, counted: dict[str, int]) -> None:
    assert dict(plain(wikitext)[1]) == counted


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("이름(, 1924년 ~ )은", "이름(1924년 ~)은"),
        ("이름(, )은", "이름은"),
        ("이름 ( , 가 (나))", "이름 ( , 가 (나))"),
        ("foo()와 for (;;), (a, )", "foo()와 for (;;), (a, )"),
        ("표(가, \x00, 나 / \x00)", "표(가, 나)"),
        ("(\x00 ~ \x00)글(https://a.b, \x00)", "글(https://a.b)"),
        ("밖(안(\x00))과 ((\x00))글", "밖(안)과 글"),
    ],
)
def test_mend_brackets(line: str, expected: str) -> None:
    assert mend_brackets(line) == expected


MARKS = ["{{", "}}", "{", "}", "[[", "]]", "[", "]", "{|", "|}", "|", "\n", "<ref>", "</ref>", "<ref/>", "<nowiki>"]
MARKS += ["</nowiki>", "<!--", "-->", "''", "'''", "(", ")", ",", "==", "*", ":", "<code>", "</code>", "&lt;", " "]
MARKS += [
    "-{zh:",
    "}-",
    "__TOC__",
    "https://a.b",
    "파일:",
    "lang|en|",
    "글",
    "a.b",
    "1",
    "<br>",
    "<math>",
    "\x00",
    "\\",
]


@given(st.lists(st.sampled_from(MARKS), max_size=60).map("".join))
def test_bracket_soup_never_raises(wikitext: str) -> None:
    text, _ = plain(wikitext)
    assert not set("\x00\x01") & set(text)


@given(st.lists(st.sampled_from(MARKS), max_size=60).map("".join))
def test_what_is_left_of_a_mark_is_counted(wikitext: str) -> None:
    """No mark of a template or a link reaches the text in silence, but those that stood as characters to begin with."""
    if "&" in wikitext or "<" in wikitext or "{{{" in wikitext:
        return
    text, counted = plain(wikitext)
    if "[[" in text.replace("[[[", "") or "{{" in text.replace("{{{", ""):
        assert sum(counted.values())


@given(st.text(st.characters(exclude_categories=["C"], exclude_characters="<>[]{}|'=*#:;_&-~(（"), max_size=200))
def test_text_without_marks_comes_out_as_it_is(text: str) -> None:
    kept = [" ".join(line.split()) for line in text.split("\n") if any(c.isalnum() for c in line)]
    assert [line for line in plain(text)[0].split("\n") if line] == kept


@pytest.mark.parametrize(
    "unit", ["{{", "{", "}}", "[[a|b", "{{lang|a|", "<ref>", "{|\n", "==", "[http://a", "(,", "{{{a|"]
)
def test_brackets_without_end_are_read_to_the_end(unit: str) -> None:
    """A pattern that backtracks would not come back from these in a day."""
    for wikitext in (unit * 50_000, unit * 25_000 + "]]}}" * 25_000):
        plain(wikitext)
