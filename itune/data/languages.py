"""Script and language of short texts, without a model: Unicode names for scripts, function words for languages.

Enough to see that an answer is in another language than its question; no substitute for a trained identifier.
Languages in Latin script are told apart by their most frequent function words; a text without several of them has no
language here.
"""

from __future__ import annotations

import collections
import functools
import re
import unicodedata

_FUNCTION_WORDS = {
    "English": "the of and to in is that it for was on are as with his they at be this from have or had by not "
    "but what all were we when your can there an which their if will how would could about because than been who "
    "you he she my do does",
    "Spanish": "el la de que y en un una los las es por con para no se su lo como más pero sus le ya o este sí "
    "porque esta entre cuando muy sin sobre también me hasta hay donde quien desde todo nos durante todos uno les "
    "ni contra ese eso ante ellos esto mí antes algunos qué unos yo otro otras mientras del al son está respuesta "
    "creo",
    "French": "le la les de des du un une et est que qui dans en pour pas sur ne se ce il elle au aux avec par "
    "plus son sa ses mais ou où nous vous ils elles je tu me te leur été cette ces sont être avoir fait comme "
    "tout car mon ton c'est j'ai n'est qu'il d'un d'une l'on s'il pendant très bien aussi deux",
    "German": "der die das und ist in den von zu mit sich des auf für nicht ein eine dem es im auch als an "
    "werden aus er hat dass sie nach wird bei einer um am sind noch wie einem über einen so zum war haben nur "
    "oder aber vor zur bis mehr durch man sein wurde ich du wir ihr kann wenn weil keinen keine sehr viele "
    "sollten",
    "Italian": "il lo la i gli le di che e è un una per non in con si da come del della dei delle al alla nel "
    "nella sono ma ho hai ha abbiamo questo questa più anche se perché quando molto sul sulla mentre io tu lui "
    "lei noi loro mi ti ci era essere stato tutto penso sia",
    "Portuguese": "o a os as de que e do da dos das em um uma para é com não por no na nos nas se mais mas como foi "
    "ao ele ela das tem à seu sua ou ser quando muito há já está eu também só pelo pela até isso entre era depois "
    "sem mesmo aos seus quem me esse eles você essa num nem suas meu às minha porque enquanto acho",
    "Dutch": "de het een en van is in dat op te zijn met voor niet aan er om ook als door maar bij uit naar "
    "dan ze hij wordt werd nog tot over heeft was worden deze kan die zich hun wel geen omdat terwijl ik je wij "
    "jullie mijn zeer veel moet",
    "Swedish": "och att det i en på är som för av med den till inte om ett han men var jag så från vi när man "
    "eller hon kan sig de där här bara vid också utan efter sin mycket detta varje nu blir skulle vara eftersom "
    "andra första",
    "Danish": "og at det i en på er som for af med den til ikke om et han men var jeg så fra vi når man eller "
    "hun kan sig de der her kun ved også uden efter sin meget dette nu bliver skulle være fordi jer prøve tror",
    "Polish": "i w nie na się że z do to jest o jak ale po co tak za od jego czy przez tylko są dla być który "
    "może już był tym jestem mnie go ma przy ich te ja ty myślę bardzo albo gdy ponieważ oraz",
    "Turkish": "ve bir bu da de için ile çok ne ama gibi daha olarak var en o ben sen biz kadar sonra olan değil "
    "mi ki her ise veya çünkü ya hem yok şu doğru eder etmiyor ediyor bence",
    "Indonesian": "yang dan di itu dengan untuk tidak ini dari dalam akan pada juga saya ke karena ada bisa oleh "
    "sudah atau adalah mereka kita kami telah lebih sebagai harus saat masuk jika belum anda hanya tetapi",
    "Romanian": "și de la în cu nu pe că este un o din care pentru mai se sunt sau dar ca au fost prin lui ei noi "
    "să fi acest această după între foarte când",
    "Czech": "a se v na je že to s z o do i ale jako by za po jsem jsou tak který není byl pro ve co jen už "
    "když nebo od jeho protože tento velmi být má",
    "Finnish": "ja on ei se että oli hän mutta ovat kun niin myös joka mitä kuin sen tämä ole vain sitä jos minä "
    "sinä me he koska olla tai hyvin nyt",
    "Hungarian": "a az és hogy nem is egy ez azt de van csak volt meg ha már mint még vagy el kell ki lesz nagyon "
    "mert itt most",
    "Vietnamese": "và là của có không được một trong cho các những với này người khi đã để từ đó tôi như cũng về "
    "hay rất vì",
}
FUNCTION_WORDS = {language: frozenset(listed.split()) for language, listed in _FUNCTION_WORDS.items()}
_SHARED = collections.Counter(word for listed in FUNCTION_WORDS.values() for word in listed)
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")
_NAMES = (
    r"(?:english|spanish|french|german|italian|portuguese|dutch|swedish|danish|norwegian|polish|turkish|indonesian|"
    r"romanian|czech|finnish|hungarian|vietnamese|russian|chinese|mandarin|cantonese|japanese|korean|arabic|hindi|bengali|urdu|"
    r"hebrew|greek|latin|thai|ukrainian|swahili|tamil|telugu|persian|farsi|malay|tagalog|catalan|irish|welsh|sanskrit|"
    r"cyrillic|kanji|hiragana|katakana|pinyin|hangul|devanagari|esperanto|español|français|deutsch|italiano|português)"
)
_THINGS = (
    r"(?:words?|sentences?|language|translation|text|version|phrases?|equivalent|poem|song|name|letter|alphabet|grammar|"
    r"verbs?)\b"
)
_MENTION = re.compile(
    r"\b(?:translat|transliterat|traduc|tradu[zç]|übersetz)\w*|\b(?:foreign |another |native )languages?\b"
    rf"|\bdialects?\b|\b(?:in|into|to|from|speak\w*|say|using|en|auf|em) (?:\w+ )?{_NAMES}"
    rf"(?:\s*[.,:;?!)\"'\n]|\s*$|\s+(?:{_THINGS}|(?:and|or|to|for)\b))|\b{_NAMES} {_THINGS}",
    re.IGNORECASE,
)
ENDS = 240  # characters at both ends of a prompt, where instructions stand
_UNITED = {"HIRAGANA": "CJK", "KATAKANA": "CJK", "KATAKANA-HIRAGANA": "CJK", "IDEOGRAPHIC": "CJK", "HANGUL": "HANGUL"}


def speaks_of_language(prompt: str) -> bool:
    """Whether the prompt names a language or a translation, so that an answer in another one may be wanted."""
    return any(_MENTION.search(end) for end in dict.fromkeys((prompt[:ENDS], prompt[-ENDS:])))


@functools.lru_cache(maxsize=8192)
def _script_of(letter: str) -> str:
    name = unicodedata.name(letter, "").split(" ")[0]
    return _UNITED.get(name, name)


def scripts(text: str) -> dict[str, int]:
    """Letters by script (LATIN, CYRILLIC, CJK, ...)."""
    found: dict[str, int] = {}
    for letter, count in collections.Counter(text).items():
        if letter.isalpha():
            script = "LATIN" if letter < "\u0250" else _script_of(letter)
            found[script] = found.get(script, 0) + count
    return found


def other_script(prompt: str, response: str) -> str:
    """The script of most of the response's letters, if the prompt has hardly any of it; else ""."""
    if response.isascii() and prompt.isascii():
        return ""
    answered, asked = scripts(response), scripts(prompt)
    if not answered or not asked:
        return ""
    script = max(answered, key=lambda name: answered[name])
    letters = answered[script]
    enough = letters >= (1 if script == "CJK" else 2) and letters > 0.5 * sum(answered.values())
    return script if enough and asked.get(script, 0) < 0.05 * sum(asked.values()) else ""


def language(text: str, least: int = 2) -> tuple[str, float]:
    """The language whose function words are most frequent in a text in Latin script, and how clearly (0 to 1).

    ("", 0) where fewer than `least` different function words occur. Words of several languages count in part for each.
    """
    found = _WORD.findall(text.lower().replace("\u2019", "'"))
    if not found:
        return "", 0.0
    scores, known = {}, [word for word in found if word in _SHARED]
    for name, listed in FUNCTION_WORDS.items():
        hits = [word for word in known if word in listed]
        if len(set(hits)) >= least:
            scores[name] = sum(1 / _SHARED[word] for word in hits) / len(found)
    if not scores:
        return "", 0.0
    best = max(scores, key=lambda name: scores[name])
    return best, scores[best]


def other_language(prompt: str, response: str) -> str:
    """The language of the response, if it is clearly another than the prompt's; else ""."""
    answered, share = language(response)
    if not answered or share < 0.15 or len(_WORD.findall(response)) < 5:
        return ""
    asked, certainty = language(prompt)
    if not asked or asked == answered or certainty < 0.1:
        return ""
    own = FUNCTION_WORDS[asked] - FUNCTION_WORDS[answered]
    other = FUNCTION_WORDS[answered] - FUNCTION_WORDS[asked]
    found = _WORD.findall(response.lower().replace("\u2019", "'"))
    hits_own, hits_other = sum(word in own for word in found), sum(word in other for word in found)
    return answered if hits_other >= 2 and hits_own * 3 <= hits_other else ""
