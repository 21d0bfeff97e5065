"""A summary task: a short record or message thread, and one sentence about it in a fixed house style.

House style: the kind of note, a colon, then who does what, on which day, at what time, where, always in this order;
codes, phone numbers, thanks and plans that were changed are left out. Scored by ROUGE-L.
"""

import hashlib
import random
from dataclasses import dataclass
from typing import Literal

_TRIES = 100  # drafts per example


@dataclass(frozen=True)
class SummaryExample:
    """What the model sees (the note and the task in one sentence), and the summary it should give."""

    prompt: str
    summary: str


@dataclass(frozen=True)
class _Kind:
    """A kind of note. In `fields`, each name has the labels a record may use for it and the values it may take.

    `threads` are message threads; "{other_day}" in them stands for another day than the one that counts.
    """

    label: str
    fields: dict[str, tuple[tuple[str, ...], tuple[str, ...]]]
    summary: str
    threads: tuple[str, ...]
    headings: tuple[str, ...]


_FIRST = (
    "Ada", "Ben", "Carla", "Dario", "Elif", "Farah", "Greta", "Hugo", "Ines", "Jonas", "Kim", "Lena", "Milo", "Nadia",
    "Otto", "Petra", "Rosa", "Sami", "Tove", "Viktor",
)  # fmt: skip
_LAST = ("Berg", "Costa", "Dunn", "Evans", "Fox", "Hill", "Kaya", "Lund", "Marsh", "Novak", "Park", "Reed", "Stone")
_PEOPLE = tuple(f"{first} {last}" for first in _FIRST for last in _LAST)
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_TIMES = tuple(f"{hour}:{minute:02}" for hour in range(8, 20) for minute in (0, 15, 30, 45))
_THINGS = tuple(
    f"{colour} {thing}"
    for colour in ("red", "blue", "green", "black", "white", "grey", "brown")
    for thing in ("backpack", "scarf", "kettle", "lamp", "jacket", "notebook", "suitcase", "bicycle helmet", "teapot")
)
_CITIES = ("Bergen", "Cork", "Dresden", "Ghent", "Lyon", "Malmo", "Porto", "Riga", "Tartu", "Turin", "York", "Zadar")
_NUMBERS = tuple(map(str, range(2, 20)))

_WHO, _DAY, _TIME = ("Name", "For", "Person", "Contact"), ("Day", "Date", "When"), ("Time", "Hour", "At")
_PERSON, _WEEKDAY, _CLOCK = (_WHO, _PEOPLE), (_DAY, _DAYS), (_TIME, _TIMES)
_PLACE = ("Place", "Where", "Location")

_KINDS = (
    _Kind(
        "Delivery",
        {
            "who": _PERSON,
            "what": (("Item", "Parcel", "Goods"), _THINGS),
            "day": _WEEKDAY,
            "time": _CLOCK,
            "place": (_PLACE, ("back door", "front desk", "garage", "garden shed", "post room", "side gate")),
        },
        "{who} gets a {what} on {day} at {time} at the {place}.",
        (
            "Driver: I have a {what} for {who}. Is {other_day} at {time} all right?\n"
            "{first}: I am away then. {day}, same time?\nDriver: Fine. Where to?\n{first}: The {place}, please.",
            "{first}: Hello, {who} here. When does my {what} arrive?\nShop: {day}, about {time}.\n"
            "{first}: Nobody is in, so leave it at the {place}.\nShop: Will do, thanks.",
        ),
        ("Parcel service", "Shipping note", "Order update"),
    ),
    _Kind(
        "Appointment",
        {
            "who": _PERSON,
            "what": (
                ("With", "To see", "Service"),
                ("dentist", "optician", "hairdresser", "tax adviser", "tailor", "piano teacher", "vet"),
            ),
            "day": _WEEKDAY,
            "time": _CLOCK,
            "place": (_PLACE, tuple(f"room {n}" for n in _NUMBERS)),
        },
        "{who} sees the {what} on {day} at {time} in {place}.",
        (
            "{first}: This is {who}. I have to move my visit on {other_day}.\nDesk: The {what} is free on {day} at "
            "{time}.\n{first}: That suits me. Still upstairs?\nDesk: No, {place} now.",
            "Desk: A reminder for {who}: the {what} expects you on {day}.\n{first}: At {other_time}?\n"
            "Desk: No, at {time}, in {place}.\n{first}: Good that I asked.",
        ),
        ("Visit card", "Booking desk", "Reminder"),
    ),
    _Kind(
        "Match",
        {
            "who": (("Home", "Home side", "Hosts"), tuple(f"{city} United" for city in _CITIES[:6])),
            "what": (("Visitors", "Away side", "Guests"), tuple(f"{city} Rovers" for city in _CITIES[6:])),
            "score": (("Score", "Result", "Final score"), tuple(f"{a}-{b}" for a in range(2, 6) for b in range(a))),
            "day": _WEEKDAY,
            "place": (_PLACE, ("City Stadium", "Hill Park", "Lake Arena", "Mill Field", "North Ground")),
        },
        "{who} beat {what} {score} on {day} at {place}.",
        (
            "{a}: Did you watch {who} on {day}?\n{b}: At {place}, yes. {score} in the end.\n"
            "{a}: Against {what}? I thought the game was on {other_day}.\n{b}: It was moved.",
            "{a}: {what} lost again, {score}.\n{b}: To whom?\n{a}: {who}, at {place} on {day}.\n"
            "{b}: And I wanted to go!",
        ),
        ("Match report", "Football league", "Results service"),
    ),
    _Kind(
        "Weather",
        {
            "who": (("City", "Town", "Area"), _CITIES),
            "what": (("Outlook", "Sky", "Forecast"), ("clouds", "drizzle", "fog", "light rain", "strong wind")),
            "day": _WEEKDAY,
            "part": (("Part of day", "Hours", "Period"), ("morning", "afternoon", "evening")),
            "degrees": (("Degrees", "Temperature", "High"), _NUMBERS),
        },
        "{who} expects {what} on {day} {part} at {degrees} degrees.",
        (
            "{a}: Will it stay dry in {who} on {other_day}?\n{b}: Yes. The change comes on {day}: {what} in the {part}."
            "\n{a}: How warm?\n{b}: {degrees} degrees at most.",
            "{a}: I land in {who} on {day}, in the {part}.\n{b}: They say {what}.\n{a}: Cold?\n"
            "{b}: {degrees} degrees. Take a coat.",
        ),
        ("Forecast", "Weather desk", "Bulletin"),
    ),
    _Kind(
        "Lost item",
        {
            "who": (("Owner", "Reported by", "Name"), _PEOPLE),
            "what": (("Item", "Object", "Lost"), _THINGS),
            "day": _WEEKDAY,
            "time": _CLOCK,
            "place": (_PLACE, ("bus stop", "cinema", "ferry", "library", "market", "museum", "swimming pool")),
        },
        "{who} lost a {what} on {day} at {time} at the {place}.",
        (
            "{first}: My name is {who}. Has anybody handed in a {what}?\nOffice: Not yet. Where was it?\n"
            "{first}: At the {place}, on {day}.\nOffice: What time?\n{first}: {time}, I think.",
            "Office: Lost property.\n{first}: {who}. I lost my {what} on {other_day}, no, {day}.\n"
            "Office: Where did you have it last?\n{first}: At the {place}, at {time}.",
        ),
        ("Lost property", "Search request", "Front office"),
    ),
    _Kind(
        "Table",
        {
            "who": (("Name", "Guest", "Booked by"), _PEOPLE),
            "size": (("Guests", "Seats", "Party"), _NUMBERS),
            "day": _WEEKDAY,
            "time": _CLOCK,
            "place": (("Restaurant", "House", "Where"), ("Blue Door", "Old Mill", "Red Pepper", "Swan", "Two Pines")),
        },
        "{who} books for {size} on {day} at {time} at the {place}.",
        (
            "{first}: A table for {other_size}, please. The name is {who}.\nWaiter: At the {place}? When?\n"
            "{first}: {day} at {time}. Oh, and we are {size} now.\nWaiter: Noted.",
            "Waiter: The {place}, good day.\n{first}: {who}. May we come on {day} at {time}?\n"
            "Waiter: How many are you?\n{first}: {size}, one of them a baby.",
        ),
        ("Reservation", "Table book", "Guest list"),
    ),
    _Kind(
        "Repair",
        {
            "who": (("Worker", "Assigned to", "Sent"), _PEOPLE),
            "what": (("Job", "Object", "To repair"), ("boiler", "doorbell", "dishwasher", "heater", "lift", "tap")),
            "day": _WEEKDAY,
            "time": _CLOCK,
            "place": (("Flat", "Address", "Place"), tuple(f"flat {n}" for n in _NUMBERS)),
        },
        "{who} repairs the {what} on {day} at {time} in {place}.",
        (
            "Tenant: The {what} in {place} does not work.\nOffice: {who} can come on {other_day}.\n"
            "Tenant: I work then. {day}?\nOffice: Yes, at {time}.",
            "Office: {who}, are you free on {day}?\n{first}: From {time}. What is it?\n"
            "Office: The {what} in {place}.\n{first}: I will bring the big toolbox.",
        ),
        ("Work order", "House service", "Repair slip"),
    ),
    _Kind(
        "Shift",
        {
            "who": (("Works", "Staff", "Covered by"), _PEOPLE),
            "what": (("Instead of", "Away", "Replaces"), ("Anton", "Bea", "Cleo", "David", "Erik", "Gita", "Ivan")),
            "day": _WEEKDAY,
            "time": (("Start", "From", "Begins"), _TIMES),
            "place": (("Post", "Desk", "Where"), ("bakery", "bar", "kitchen", "reception", "till", "warehouse")),
        },
        "{who} replaces {what} on {day} from {time} at the {place}.",
        (
            "{what}: I cannot work on {day}. Can anyone help?\nBoss: {who} could do it.\n"
            "{first}: Sure. The {place}, as on {other_day}?\nBoss: Yes, from {time}.",
            "Boss: {what} is on leave, so the {place} is empty on {day}.\n{first}: {who} here, I can come.\n"
            "Boss: At {time}?\n{first}: See you then.",
        ),
        ("Rota change", "Staff plan", "Shift board"),
    ),
)  # fmt: skip

_TASK = "Summarise this in one sentence."


def make_summary_examples(count: int, seed: int, split: Literal["train", "eval"]) -> list[SummaryExample]:
    """Make examples of all kinds with equal chances; a note is a record or a message thread with chance 1/2 each.

    Deterministic for (count, seed, split). No summary, and so no set of facts, is in both splits, for any seeds, or
    twice in one list; the wordings around the facts are shared.

    Raises:
        ValueError: a negative count, an unknown split, or the space of facts is exhausted.
    """
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    if split not in ("train", "eval"):
        raise ValueError(f"split must be 'train' or 'eval', got {split!r}")
    rng = random.Random(f"summary-{split}-{seed}")
    examples: dict[str, SummaryExample] = {}
    for _ in range(count):
        for _ in range(_TRIES):
            kind = rng.choice(_KINDS)
            facts = {name: rng.choice(values) for name, (_, values) in kind.fields.items()}
            summary = f"{kind.label}: {kind.summary.format(**facts)}"
            if summary not in examples and _is_eval(summary) == (split == "eval"):
                break
        else:
            raise ValueError(f"no new summary after {_TRIES} tries")
        note = rng.choice((_record, _thread))(rng, kind, facts)
        examples[summary] = SummaryExample(f"{note}\n{_TASK}", summary)
    return list(examples.values())


def _is_eval(summary: str) -> bool:
    """Whether a summary belongs to the evaluation split, for any seed: parity of a hash."""
    return hashlib.sha256(summary.encode()).digest()[0] % 2 == 1


def _record(rng: random.Random, kind: _Kind, facts: dict[str, str]) -> str:
    """The facts as labelled fields in random order, with one or two that the summary leaves out."""
    extras = (
        ("Reference", f"{rng.choice('ABCDEFGH')}{rng.randint(100, 999)}"),
        ("Phone", f"555 {rng.randint(1000, 9999)}"),
        ("Entered by", rng.choice(_FIRST)),
        ("Page", f"{rng.randint(1, 40)}"),
    )
    cells = [(rng.choice(kind.fields[name][0]), value) for name, value in facts.items()]
    cells += rng.sample(extras, rng.choice((1, 2)))
    rng.shuffle(cells)
    joint, colon = rng.choice((("\n", ": "), (" | ", ": "), ("; ", " = ")))
    return f"{rng.choice(kind.headings)}\n{joint.join(label + colon + value for label, value in cells)}"


def _thread(rng: random.Random, kind: _Kind, facts: dict[str, str]) -> str:
    """The facts as messages; writers "{a}" and "{b}" are strangers, "{first}" is the person the note is about."""
    first = facts["who"].split()[0]
    a, b = rng.sample([name for name in _FIRST if name != first], 2)
    others = {
        f"other_{name}": rng.choice([value for value in kind.fields[name][1] if value != fact])
        for name, fact in facts.items()
    }
    return rng.choice(kind.threads).format(first=first, a=a, b=b, **facts, **others)
