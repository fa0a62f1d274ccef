"""Collectives of a compiled program: loops counted, one collective in several fusions counted once."""

from __future__ import annotations

import pytest

from itune.plan.hlo import between_slices, collectives, moved

FOR_GPUS = """HloModule jit_step, is_scheduled=true

%wrapped (a: s32[], b: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %less = pred[] compare(%a, %b), direction=LT
}

%cond (t: (s32[], s32[])) -> pred[] {
  %t = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[] get-tuple-element(%t), index=1
  ROOT %wrapped_compare = pred[] fusion(%i, %n), kind=kLoop, calls=%wrapped
}

%body (t: (s32[], s32[])) -> (s32[], s32[]) {
  %t = (s32[], s32[]) parameter(0)
  %s.1 = ((f32[16]{0}, f32[32]{0}), (f32[4]{0}, f32[8]{0})) reduce-scatter-start(%t), replica_groups=[1,4]<=[4]
  %s.2 = ((bf16[8]{0}), bf16[32]{0}) all-gather-start(%t), replica_groups=[1,4]<=[4]
  %s.3 = ((f32[16]{0}), f32[16]{0}, u32[], u32[]) all-to-all-start(%t), replica_groups=[1,4]<=[4]
  %s.4 = (f32[16]{0}, f32[4]{0}) all-reduce-start(%t), replica_groups=[1,4]<=[4]
  ROOT %out = (s32[], s32[]) tuple(%t)
}

ENTRY %main (t: (s32[], s32[])) -> (s32[], s32[]) {
  %t = (s32[], s32[]) parameter(0)
  ROOT %w = (s32[], s32[]) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"6"},"x":1}
}
"""


def test_what_xla_for_gpus_writes():
    """Tuples of operands and results, sometimes flags, and a trip count that it says itself."""
    assert moved(collectives(FOR_GPUS)) == {
        "reduce-scatter": 6 * 3 * 4 * (4 + 8), "all-gather": 6 * 0.75 * 2 * 32, "all-to-all": 6 * 0.75 * 4 * 16,
        "all-reduce": 6 * 1.5 * 4 * (16 + 4),
    }  # fmt: skip

PROGRAM = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%spread.1 (p: bf16[8,64]) -> bf16[64,64] {
  %p = bf16[8,64]{1,0} parameter(0)
  ROOT %ag.1 = bf16[64,64]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=mesh['x'=8] {'x'}
}

%spread.2 (p: bf16[8,64]) -> bf16[64,64] {
  %p = bf16[8,64]{1,0} parameter(0)
  ROOT %ag.2 = bf16[64,64]{1,0} all-gather(%p), channel_id=7, replica_groups=mesh['x'=8] {'x'}, dimensions={0}
}

%layers_body (t: (s32[], bf16[8,64], f32[32])) -> (s32[], bf16[8,64], f32[32]) {
  %t = (s32[], bf16[8,64], f32[32]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %x = bf16[8,64]{1,0} get-tuple-element(%t), index=1
  %y = f32[32]{0} get-tuple-element(%t), index=2
  %start = bf16[64,64]{1,0} fusion(%x), kind=kCustom, calls=%spread.1
  %more = bf16[64,64]{1,0} fusion(%x), kind=kCustom, calls=%spread.2
  %again = bf16[64,64]{1,0} fusion(%x), kind=kCustom, calls=%spread.2
  %r = f32[4]{0} reduce-scatter(%y), channel_id=9, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, to_apply=%add
  ROOT %out = (s32[], bf16[8,64], f32[32]) tuple(%next, %x, %y)
}

%layers_cond (t: (s32[], bf16[8,64], f32[32])) -> pred[] {
  %t = (s32[], bf16[8,64], f32[32]) parameter(0)
  %bound = s32[] constant(10)
  %i = s32[] get-tuple-element(%t), index=0
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

%ring_body (t: (bf16[8,64], u32[])) -> (bf16[8,64], u32[]) {
  %t = (bf16[8,64], u32[]) parameter(0)
  %x = bf16[8,64]{1,0} get-tuple-element(%t), index=0
  %i = u32[] get-tuple-element(%t), index=1
  %two = u32[] constant(2)
  %next = u32[] add(%i, %two)
  %s = (bf16[8,64]{1,0}, bf16[8,64]{1,0}, u32[], u32[]) collective-permute-start(%x), channel_id=3
  %d = bf16[8,64]{1,0} collective-permute-done(%s)
  ROOT %out = (bf16[8,64], u32[]) tuple(%d, %next)
}

%ring_cond (t: (bf16[8,64], u32[])) -> pred[] {
  %t = (bf16[8,64], u32[]) parameter(0)
  %bound = u32[] constant(8)
  %i = u32[] get-tuple-element(%t), index=1
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

%chunk_body (t: (s32[], s32[], f32[16])) -> (s32[], s32[], f32[16]) {
  %t = (s32[], s32[], f32[16]) parameter(0)
  %x = f32[16]{0} get-tuple-element(%t), index=2
  %ar = f32[16]{0} all-reduce(%x), channel_id=5, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %out = (s32[], s32[], f32[16]) tuple(%t)
}

%chunk_cond (t: (s32[], s32[], f32[16])) -> pred[] {
  %t = (s32[], s32[], f32[16]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %count = s32[] get-tuple-element(%t), index=1
  ROOT %less = pred[] compare(%i, %count), direction=LT
}

ENTRY %main (x: bf16[8,64], y: f32[32]) -> bf16[8,64] {
  %x = bf16[8,64]{1,0} parameter(0)
  %layers = (s32[], bf16[8,64], f32[32]) while(%x), condition=%layers_cond, body=%layers_body
  %ring = (bf16[8,64], u32[]) while(%x), condition=%ring_cond, body=%ring_body
  %chunks = (s32[], s32[], f32[16]) while(%x), condition=%chunk_cond, body=%chunk_body
  ROOT %a2a = bf16[8,64]{1,0} all-to-all(%x), channel_id=11, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
}
"""


def test_bytes_by_operation_with_loops_counted():
    assert moved(collectives(PROGRAM, unknown_trips=3)) == {
        "all-gather": pytest.approx(10 * 64 * 64 * 2 * 7 / 8),  # ten layers, one channel in three fusions
        "reduce-scatter": pytest.approx(10 * 4 * 4 * 7),
        "collective-permute": pytest.approx(4 * 8 * 64 * 2),  # counts to 8 by twos
        "all-reduce": pytest.approx(3 * 16 * 4 * 2 * 3 / 4),  # groups of four, a loop without a constant bound
        "all-to-all": pytest.approx(8 * 64 * 2 * 7 / 8),
    }


def test_a_loop_without_a_bound_counts_as_often_as_it_is_told():
    def reduced(trips):
        return next(c.times for c in collectives(PROGRAM, trips) if c.kind == "all-reduce")

    assert (reduced(1), reduced(5)) == (1, 5)


SLICES = """HloModule jit_step, is_scheduled=true

%body (t: (s32[], f32[64])) -> (s32[], f32[64]) {
  %t = (s32[], f32[64]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %send.1 = (f32[64]{0}, u32[], token[]) send(%x, %a), channel_id=4, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.1_0",_xla_megascale_target="{1,2,3,4}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv.1 = (f32[64]{0}, u32[], token[]) recv(%a), channel_id=3, is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.1_0",_xla_megascale_target="{1,2,3,4}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %out = (s32[], f32[64]) tuple(%next, %x)
}

%cond (t: (s32[], f32[64])) -> pred[] {
  %t = (s32[], f32[64]) parameter(0)
  %bound = s32[] constant(10)
  %i = s32[] get-tuple-element(%t), index=0
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

ENTRY %main (x: f32[64]) -> f32[64] {
  %x = f32[64]{0} parameter(0)
  %first = s32[] constant(1)
  %begin = (s32[], f32[64]) tuple(%first, %x)
  %loop = (s32[], f32[64]) while(%begin), condition=%cond, body=%body
  %recv.2 = (bf16[2,8]{1,0}, u32[], token[]) recv(%a), channel_id=5, frontend_attributes={_xla_host_transfer_rendezvous="all-to-all.7_0",_xla_megascale_target={{100000,100001,200000,200001}},_xla_megascale_transfer_type="ALL_TO_ALL"}
  %recv.3 = (bf16[8]{0}, u32[], token[]) recv(%a), channel_id=6, is_host_transfer=true
  ROOT %ar = f32[64]{0} all-reduce(%x), channel_id=9, replica_groups={{0,1,2,3}}, to_apply=%add
}
"""  # noqa: E501


def test_what_slices_exchange_is_told_from_what_stays_inside_one():
    first, second = sorted(between_slices(SLICES))
    assert first == ("all-reduce", "f32[64]", 4, 9, 64 * 4 * 2 * 3 / 4, "all-reduce.1_0")  # 1 to 9
    assert second == ("all-to-all", "bf16[2,8]", 2, 1, 16 * 2 / 2, "all-to-all.7_0")
    assert [(one.kind, one.group) for one in collectives(SLICES)] == [("all-reduce", 4)]


def test_collectives_of_shard_map_share_a_channel_and_all_count():
    text = """HloModule jit_step

ENTRY %main (x: bf16[8,64]) -> bf16[64,64] {
  %x = bf16[8,64]{1,0} parameter(0)
  %a = bf16[64,64]{1,0} all-gather(%x), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, metadata={op_name="a"}
  %b = bf16[64,64]{1,0} all-gather(%x), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, metadata={op_name="b"}
  ROOT %c = bf16[8,64]{1,0} all-to-all(%a), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, metadata={op_name="a"}
}
"""
    assert sorted((one.kind, one.source) for one in collectives(text)) == [
        ("all-gather", "a"), ("all-gather", "b"), ("all-to-all", "a")]
