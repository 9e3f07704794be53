"""Style sheet of a report: light and dark, from phone to desk."""

STYLE = """
:root { color-scheme: light dark; --bg: #fff; --fg: #1b1f24; --dim: #59636e; --rule: #d1d9e0;
 --panel: #f6f8fa; --warn: #fff5d6; --warn-rule: #d4a72c; --grey: #8c959f;
 --c0: #0b62b8; --c1: #c2410c; --c2: #15803d; --c3: #a21caf; --c4: #a16207; --c5: #0e7490;
 --c6: #be123c; --c7: #4b5563;
 --k0: #1f77b4; --k1: #e8730c; --k2: #2ca02c; --k3: #d62728; --k4: #9467bd; --k5: #8c564b;
 --k6: #d45fb3; --k7: #7a7a7a; --k8: #a5a614; --k9: #10a7b8; }
@media (prefers-color-scheme: dark) { :root { --bg: #0f1318; --fg: #e6edf3; --dim: #9aa5b1;
 --rule: #30363d; --panel: #171c23; --warn: #2e2508; --warn-rule: #9e7b16;
 --c0: #5aa9f7; --c1: #ff9452; --c2: #4ade80; --c3: #e879f9; --c4: #facc15; --c5: #22d3ee;
 --c6: #fb7185; --c7: #b6bfc9; --k0: #4c9be0; --k5: #b98577; --k4: #b18be0; --k7: #a8a8a8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px; max-width: 1240px; background: var(--bg); color: var(--fg);
 font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 26px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 0 0 10px; }
h3 { font-size: 16px; margin: 18px 0 8px; }
header p, section > p { color: var(--dim); margin: 4px 0 12px; }
section { margin-top: 32px; }
.tiles { display: flex; flex-wrap: wrap; gap: 10px; margin-top: 18px; }
.tiles div { background: var(--panel); border: 1px solid var(--rule); border-radius: 8px;
 padding: 8px 16px; min-width: 110px; }
.tiles b { display: block; font-size: 20px; } .tiles span { color: var(--dim); font-size: 13px; }
.warn { background: var(--warn); border: 1px solid var(--warn-rule); border-radius: 8px;
 padding: 14px 18px; } .warn ul { margin: 0; padding-left: 20px; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(460px, 100%), 1fr));
 gap: 16px; align-items: start; }
figure { margin: 0; padding: 12px 14px; background: var(--panel); border: 1px solid var(--rule);
 border-radius: 8px; } figcaption { font-weight: 600; }
figure p { margin: 6px 0 0; font-size: 13px; color: var(--dim); }
figure ul { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 4px 0 6px; padding: 0;
 list-style: none; font-size: 13px; overflow-wrap: anywhere; }
i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 6px; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--dim); font-size: 12px; } .grid { stroke: var(--rule); stroke-width: .7; }
.axis { stroke: var(--dim); stroke-width: 1; fill: none; } .mark { stroke: var(--dim);
 stroke-width: 1.2; stroke-dasharray: 6 4; } .line { fill: none; stroke-width: 1.8;
 stroke-linejoin: round; stroke-linecap: round; }
.dots { fill: none; stroke-width: 5; opacity: .7; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 14px; }
td, th { padding: 4px 16px 4px 0; text-align: left; vertical-align: top;
 border-bottom: 1px solid var(--rule); font-variant-numeric: tabular-nums; }
td { max-width: 520px; overflow-wrap: anywhere; }
th { font-weight: 600; color: var(--dim); } td:first-child { white-space: nowrap; }
.pictures td { text-align: center; border: 0; padding: 4px; font-size: 12px; color: var(--dim);
 min-width: 84px; } .pictures th { border: 0; padding: 4px; text-align: center; font-size: 12px; }
.pictures td:first-child { white-space: normal; }
.pictures span { display: block; max-width: 96px; margin: 2px auto 0; overflow: hidden;
 text-overflow: ellipsis; white-space: nowrap; }
.pictures .query { padding-right: 18px; border-right: 1px solid var(--rule); }
.pictures .other img { outline: 2px dashed var(--c1); outline-offset: 1px; }
img { image-rendering: pixelated; border-radius: 3px; vertical-align: top; }
details { margin-top: 8px; } summary { cursor: pointer; color: var(--dim); }
pre { overflow-x: auto; background: var(--panel); padding: 12px; border-radius: 8px;
 font-size: 12px; }
"""
