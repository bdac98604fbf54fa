from published import published_models

from s2q.evaluation.judges.vbench import paper_dimensions
from s2q.evaluation.paper import FULL_PRECISION, METHOD, paper_model, paper_tables, published_scores


def test_published_scores_are_those_of_the_paper():
    scores = published_scores("zai-org/CogVideoX-2b", "w4a6")
    assert scores[METHOD]["imaging_quality"] == 55.49
    assert scores[METHOD]["scene"] == 32.70
    assert scores[FULL_PRECISION]["overall_consistency"] == 25.91
    assert (scores[METHOD]["clipsim"], scores[FULL_PRECISION]["flow_score"]) == (0.1838, 3.452)
    assert len(paper_dimensions()) == 8
    assert set(paper_dimensions()) < set(scores[METHOD])
    assert published_scores("thudm/cogvideox-5B", "w4a6")["ViDiT-Q"]["dynamic_degree"] == 37.50


def test_full_precision_stays_under_other_schemes():
    scores = published_scores("zai-org/CogVideoX-2b", "w4a4")
    assert scores[METHOD] == {"imaging_quality": 53.71, "scene": 34.23}
    assert scores[FULL_PRECISION]["imaging_quality"] == 58.69
    assert set(published_scores("zai-org/CogVideoX-5b", "w8a8")) == {FULL_PRECISION}
    assert published_scores("shapes-cogvideox", "w4a6") == {}


def test_the_papers_models_are_the_published_ones():
    for name, entry in published_models().items():
        for model in (entry["hub"], *entry["also"]):
            assert paper_model(model) in (name, None)
    listed = {name for table in paper_tables().values() for name in table["values"]}
    found = {paper_model(entry["hub"]) for entry in published_models().values()}
    assert listed == found - {None}
