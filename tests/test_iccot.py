"""The IC-CoT grammar: round trips, all complaints of the strict reader, what the lenient saves."""

import hashlib
import json
import random

import pytest

import iccot
from iccot import ICCoT, PlanError

BALL = ICCoT("A red ball.", ("The ball is from image_1.",))
SOFA = ICCoT(
    "A man and a woman sit on a brown sofa.",
    ("The man is from image_1.", "The woman is from image_2."),
)
C, R1, R2, R3 = (
    "<out_caption>A cat.</out_caption>",
    "<relation_1>a</relation_1>",
    "<relation_2>b</relation_2>",
    "<relation_3>c</relation_3>",
)


def test_rendered_form_is_exact():
    text = (
        "<out_caption>A red ball.</out_caption> <relation_1>The ball is from image_1.</relation_1>"
    )
    assert iccot.render(BALL) == f"<think>{text}</think>"
    assert iccot.render(BALL, think=False) == text
    relations = '[{"relation_1": "The ball is from image_1."}]'
    assert iccot.to_json(BALL) == f'{{"out_caption": "A red ball.", "relations": {relations}}}'


def test_round_trips_of_random_plans():
    rng = random.Random(0)
    letters = 'abc ABC é犬 <3 > & "quoted" it\'s {x} \\ 1,2. \n'

    def sentence():
        while not (text := "".join(rng.choices(letters, k=rng.randint(1, 40))).strip()):
            pass
        return text

    for _ in range(150):
        plan = ICCoT(sentence(), tuple(sentence() for _ in range(rng.randint(0, 12))))
        if any(iccot.TAG.search(field) for field in (plan.caption, *plan.relations)):
            continue
        for think in (True, False):
            assert iccot.parse(iccot.render(plan, think), len(plan.relations)) == plan
        assert iccot.from_json(iccot.to_json(plan), len(plan.relations)) == plan
        assert iccot.salvage(iccot.render(plan), len(plan.relations)) == (plan, [])


def test_white_space_between_and_inside_fields():
    fields = "<out_caption> A cat. </out_caption>\n\n<relation_1>\ta\n</relation_1>"
    text = f"\n <think>\n{fields} </think> \n"
    assert iccot.parse(text, 1) == ICCoT("A cat.", ("a",))
    assert iccot.parse(C + R1, 1) == ICCoT("A cat.", ("a",))
    assert iccot.parse(C) == ICCoT("A cat.", ())


CAPTION, PAIR = "<out_caption>...</out_caption>", f"<think>{C}{R1}</think>"
NEEDS_2 = "should stand here: there are 2 reference images, each needs a relation"


@pytest.mark.parametrize(
    "text, references, complaint, position",
    [
        ("", 1, f"{CAPTION} should stand here", 0),
        (R1 + C, 1, f"{CAPTION} should stand here", 0),
        ("<OUT_CAPTION>A</OUT_CAPTION>", 0, f"{CAPTION} should stand here", 0),
        ("<out_caption>A cat. " + R1, 1, f"{CAPTION} should stand here", 0),
        (C + "<relation_1>a</relation_2>", 1, "<relation_1>...</relation_1> should", len(C)),
        ("<out_caption> </out_caption>" + R1, 1, "<out_caption> is empty", 0),
        (C + R1 + R1, 2, f"<relation_2>...</relation_2> {NEEDS_2}", len(C + R1)),
        (C + R1, 2, f"<relation_2>...</relation_2> {NEEDS_2}", len(C + R1)),
        (f"<think>{C}</think>", 1, "<relation_1>...</relation_1> should", len("<think>" + C)),
        (C + R1 + R2 + R3, 2, "<relation_3> is one too many: there are 2", len(C + R1 + R2)),
        (C + " and " + R1, 1, "<relation_1>...</relation_1> should", len(C) + 1),
        (C + R1 + " done", 1, "the end should stand here", len(C + R1) + 1),
        (PAIR + " <image>", 1, "</think> should stand here", len("<think>" + C + R1)),
        (f"<think>{C}{R1}", 1, "</think> should stand here", len(f"<think>{C}{R1}")),
        (f"{C}{R1}</think>", 1, "the end should stand here", len(C + R1)),
        ("<out_caption>A <b>cat</b>.</out_caption>", 0, "<b> stands inside <out_caption>", 15),
        (
            C + "<relation_1>The cat is from image_2.</relation_1>",
            1,
            "a relation names image 2, but there is 1 reference image",
            len(C + "<relation_1>The cat is from "),
        ),
    ],
)
def test_strict_complaints_say_what_and_where(text, references, complaint, position):
    with pytest.raises(PlanError) as caught:
        iccot.parse(text, references)
    message = str(caught.value)
    assert complaint in message
    assert message.endswith(f"(at character {position}: {text[position : position + 40]!r})")


def test_every_truncation_is_refused_strictly_and_salvaged():
    text = iccot.render(SOFA)
    for length in range(len(text)):
        with pytest.raises(PlanError):
            iccot.parse(text[:length], 2)
        plan, notes = iccot.salvage(text[:length], 2)
        assert notes
        if plan is None:
            assert length <= len("<think><out_caption>")
        else:  # each saved field is a beginning of the true one
            assert len(plan.relations) == 2
            assert SOFA.caption.startswith(plan.caption) and plan.caption
            assert all(
                whole.startswith(part) for part, whole in zip(plan.relations, SOFA.relations)
            )


BOTH = ICCoT("A cat.", ("a", "b"))


@pytest.mark.parametrize(
    "text, plan, note",
    [
        (f"{R1} {C} {R2}", BOTH, "<out_caption>...</out_caption> should stand here"),
        (f"Sure, here it is: {C} then {R1} {R2} bye", BOTH, "should stand here"),
        (
            "<OUT_CAPTION>A\n cat.</Out_Caption>"
            "<Relation_1>a</RELATION_1>< relation_2 >b</ relation_2 >",
            BOTH,
            "should stand here",
        ),
        (
            "<out caption>A cat.</out caption>"
            "<relation 1>a</relation 1><relation-02>b</relation-02>",
            BOTH,
            "should stand here",
        ),
        ("<out_caption>A cat.<relation_1>a<relation_2>b", BOTH, "should stand here"),
        ("<think>A cat.</out_caption>" + R1 + R2, BOTH, "should stand here"),
        (C + R1 + "<relation_1>z</relation_1>" + R2, BOTH, "should stand here"),
        (C + R2, ICCoT("A cat.", ("", "b")), "relation_1 is missing"),
        (C + R1 + R2 + R3, BOTH, "relation_3 dropped: there are 2 reference images"),
        (
            C + R1 + "<relation_2>from image 7</relation_2>",
            ICCoT("A cat.", ("a", "from image 7")),
            "relation_2 names an image that is not there",
        ),
    ],
)
def test_salvage_repairs_and_tells(text, plan, note):
    saved, notes = iccot.salvage(text, 2)
    assert saved == plan
    assert any(note in line for line in notes), notes


def test_salvage_without_a_caption_or_with_a_huge_number():
    for text in ("", "A cat.", "<think></think>", R1, "<out_caption></out_caption>" + R1):
        plan, notes = iccot.salvage(text, 1)
        assert plan is None and notes[-1] == "no caption"
    plan, _ = iccot.salvage(C + "<relation_999999999>x</relation_999999999>")
    assert len(plan.relations) < 100


def test_a_lost_relation_is_left_out_and_does_not_shift_the_others():
    plan, _ = iccot.salvage(C + R2, 2)
    assert iccot.render(plan, think=False) == C + " " + R2
    with pytest.raises(PlanError, match="<relation_1>...</relation_1> should stand here"):
        iccot.parse(iccot.render(plan), 2)


@pytest.mark.parametrize(
    "plan", [ICCoT(""), ICCoT(" A"), ICCoT("A", (" ",)), ICCoT("a </out_caption> b")]
)
def test_render_refuses_what_parse_could_not_read(plan):
    with pytest.raises(PlanError, match="cannot be written"):
        iccot.render(plan)


@pytest.mark.parametrize(
    "value, complaint",
    [
        ("{", "not JSON of the form"),
        ([], "not JSON of the form"),
        ({"out_caption": "A"}, "not JSON of the form .*'relations'"),
        ({"out_caption": "A", "relations": "x"}, "not JSON of the form"),
        ({"out_caption": "A", "relations": [{"relation_2": "x"}]}, "relation_1"),
        ({"out_caption": 3, "relations": []}, "not JSON of the form"),
        ({"out_caption": "A", "relations": [{"relation_1": "x", "x": 1}]}, "without other keys"),
        ({"out_caption": "A", "relations": [{"relation_1": " "}]}, "<relation_1>.* should stand"),
        ({"out_caption": "A", "relations": []}, "<relation_1>.* should stand here"),
        ({"out_caption": "A", "relations": [{"relation_1": "from image_5"}]}, "names image 5"),
    ],
)
def test_from_json_complaints(value, complaint):
    with pytest.raises(PlanError, match=complaint):
        iccot.from_json(value if isinstance(value, str) else json.dumps(value), 1)


@pytest.mark.parametrize(
    "relation, number",
    [
        ("The ball is from image_3.", 3),
        ("Image_12 gives the ball", 12),
        ("<|image_0|>", 0),
        ("the ball of image 3", 3),
        ("image_1, image_2 and image_4", 4),
        ("把image_3的狗放在一起", 3),
        ("The ball is from image_2", None),
        ("zoom into the image 3 times", None),
        ("an image 3D in style", None),
        ("image 90° to the left", None),
        ("image 16:9", None),
        ("image_3.jpg", None),
        ("in photo 4 friends laugh", None),
        ("picture 3 men in a boat", None),
        ("myimage_3", None),
        ("image 1980", None),
    ],
)
def test_a_relation_may_not_name_an_absent_image(relation, number):
    text = iccot.render(ICCoT("A boat.", (relation, "It is from image_2.")))
    if number is None:
        iccot.parse(text, 2)
    else:
        with pytest.raises(PlanError, match=f"names image {number}, but there are 2 reference"):
            iccot.parse(text, 2)
    iccot.parse(text)  # of any number of references


def test_system_prompt_is_bagels():
    prompt = iccot.GENERATION_SYSTEM_PROMPT
    assert len(prompt) == 209
    digest = hashlib.sha256(prompt.encode()).hexdigest()
    assert digest == "837914a3f5f8ec1be30d2fdb68f4e494a3d4767056100a113c4109af5367d390"
