"""Words of eight semantic categories, and lists in a known order; common English nouns, names and adjectives.

Each is one token of GPT-2's tokenizer with the space before it; for another tokenizer `category` keeps those that are.
"""

CATEGORIES: dict[str, tuple[str, ...]] = {
    name: tuple(words.split())
    for name, words in {
        "animals": """cat dog horse cow pig sheep goat wolf bear lion tiger elephant monkey rabbit mouse rat fox deer
            snake frog fish shark whale bird duck eagle chicken turkey bee spider butterfly dolphin turtle dragon
            donkey lamb crow owl""",
        "colours": """red blue green yellow white black brown purple orange pink grey gold silver violet crimson
            amber olive cyan gray ivory bronze copper coral rose tan navy ruby""",
        "countries": """France Germany Italy Spain Portugal Greece Turkey Poland Russia China Japan India Brazil Mexico
            Canada Australia Egypt Iran Iraq Israel Sweden Norway Denmark Finland Ireland Scotland Belgium Austria
            Hungary Ukraine Pakistan Indonesia Vietnam Thailand Argentina Chile Colombia Peru Cuba Kenya Nigeria""",
        "foods": """bread cheese butter milk egg rice pasta soup salad pizza burger sandwich cake cookie chocolate sugar
            salt pepper apple banana lemon tomato potato onion garlic carrot corn beans beef pork bacon sausage steak
            honey cream yogurt pie sauce fruit""",
        "body": """head hair face eye ear nose mouth lip tooth tongue neck shoulder arm elbow wrist hand finger thumb
            chest stomach back hip leg knee ankle foot toe skin bone brain heart lung liver kidney throat jaw chin
            spine skull""",
        "professions": """doctor nurse teacher lawyer engineer farmer soldier artist writer actor singer dancer chef
            pilot driver priest judge scientist professor journalist photographer architect accountant butcher
            baker tailor surgeon dentist detective musician politician sailor""",
        "clothing": """shirt pants dress skirt coat jacket hat cap shoes boots socks gloves scarf belt tie suit sweater
            jeans shorts uniform robe helmet mask veil hood vest gown sleeve collar underwear""",
        "instruments": """guitar piano violin drum trumpet bass organ keyboard bell horn
            whistle percussion synth drums bells horns sax strings pipe pipes guitars keyboards triangle bow""",
    }.items()
}
"""The default: each word stands with a space before it."""

SYMBOLS: dict[str, tuple[str, ...]] = {
    "pronouns": (" he", " she", " it", " they", " we", " you", " I", " his", " her", " He", " She", " They"),
    "verbs": (" was", " had", " said", " saw", " want", " play", " do", " be", " is", " are", " go", " went", " named"),
    "prepositions": (" to", " in", " with", " up", " on", " of", " for", " upon", " at", " by", " from"),
    "nouns": (" day", " time", " mom", " friend", " Tim", " Lily", " Timmy", " dog", " man", " boy", " girl"),
    "capitals": tuple("ABCDEFGHIJKLMNOPRSTUVWXYZ"),
    "letters": tuple("abcdefghijklmnopqrstuvwxyz"),
    "digits": tuple("0123456789"),
    "punctuation": (".", ",", "!", "?", ":", ";", "-", "'", '"', "(", ")", "/"),
}
"""For vocabularies too small to hold words: parts of speech, letters and signs, spaces as they stand."""


SUCCESSIONS: dict[str, tuple[str, ...]] = {
    name: tuple(words.split())
    for name, words in {
        "days": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
        "months": "January February March April May June July August September October November December",
        "numbers": "one two three four five six seven eight nine ten eleven twelve",
        "digits": "1 2 3 4 5 6 7 8 9 10 11 12",
        "ordinals": "first second third fourth fifth sixth seventh eighth ninth tenth",
        "letters": "A B C D E F G H I J K L",
    }.items()
}

SENTENCES = (
    "The {animals} and the {animals} slept beside the {colours} {clothing}, and the {animals} looked at them.",
    "She bought some {foods}, some {foods} and a little {foods} for the {professions}.",
    "In {countries} and in {countries} many people eat {foods} with {foods}.",
    "The {professions} wore a {colours} {clothing} and a {colours} {clothing}, and the {professions} did not.",
    "He hurt his {body} and his {body}, so the {professions} looked at his {body}.",
    "Once upon a time there was a {colours} {animals} who wanted to play the {instruments}.",
    "They played the {instruments} and the {instruments} until the {professions} asked for the {instruments}.",
    "My friend from {countries} has a {animals}, a {animals} and a {colours} {instruments}.",
    "On Monday the {professions} went to {countries}, and on Tuesday to {countries}.",
    "Put the {clothing} and the {clothing} next to the {colours} {instruments}, said the {professions}.",
)
"""Sentences for models with a tokenizer where the user gives no text."""
