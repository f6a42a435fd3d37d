"""The page's style sheet."""

STYLE = """
:root{color-scheme:light;--ink:#1d2129;--quiet:#5c6370;--line:#e3e6ea;--red:#c1121f;--blue:#0c4e94}
*{box-sizing:border-box}
body{margin:0;background:#f6f7f8;color:var(--ink);
font:15px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1280px;margin:0 auto;padding:20px 24px 48px}
h1{font-size:22px;line-height:1.25;margin:2px 0 0;font-weight:650;letter-spacing:-.01em}
h2{font-size:17px;margin:0 0 4px;font-weight:650}
.verdict{background:#fff;border:1px solid var(--line);border-left:8px solid var(--quiet);
border-radius:8px;padding:14px 20px 16px}
.verdict.starving{border-left-color:var(--red)}
.verdict.starving h1{color:var(--red)}
.verdict.alive{border-left-color:var(--blue)}
.facts{margin:0;color:var(--quiet);font-size:13.5px;overflow-wrap:anywhere}
ul.starving{list-style:none;display:flex;
flex-wrap:wrap;gap:6px;margin:12px 0 0;padding:0;font-size:13.5px}
ul.starving li{display:flex;align-items:center;gap:7px;border:1px solid var(--line);
border-radius:5px;padding:2px 9px 2px 7px;background:#fff;white-space:nowrap}
ul.starving i{width:11px;height:11px;border-radius:2px;border:1px solid #0002}
ul.starving b{font-variant-numeric:tabular-nums;font-weight:650}
ul.notes{margin:12px 0 0;padding:8px 12px 8px 30px;color:#6a4a00;background:#fff8e6;
border:1px solid #f0dfb0;border-radius:8px;font-size:14px}
section{background:#fff;border:1px solid var(--line);border-radius:8px;padding:14px 20px 16px;
margin-top:14px}
.caption{margin:0 0 8px;color:var(--quiet);font-size:13.5px}
.scale{float:right;display:flex;align-items:center;gap:7px;font-size:12.5px;color:var(--quiet)}
.scale .ramp{display:flex;border:1px solid var(--line)}
.scale .ramp i{width:8px;height:13px}
.scale .dead{background:#1a1a1a;color:#fff;padding:0 6px;border-radius:2px;font-size:12px}
.scale em{font-style:normal}
.wide{overflow-x:auto;clear:both}
.panels{display:grid;grid-template-columns:repeat(var(--n,3),minmax(0,1fr));gap:18px 22px}
figure{margin:0;min-width:0}
figcaption{font-weight:600;font-size:14.5px;display:flex;align-items:baseline;gap:0 8px;
flex-wrap:wrap;margin-bottom:2px}
figcaption small{flex-basis:100%;
font-weight:400;color:var(--quiet);font-size:12.5px;overflow-wrap:anywhere}
.missing{margin:6px 0 0;color:var(--quiet);background:#f6f7f8;border:1px dashed #cfd4da;
border-radius:6px;padding:12px 14px;font-size:13.5px}
svg{display:block;width:100%;height:auto;font:11.5px system-ui,"DejaVu Sans",sans-serif}
svg text{fill:#3d434d;font-variant-numeric:tabular-nums}
svg text.quiet{fill:#7a818c}
@media(max-width:1000px){.panels{grid-template-columns:repeat(2,minmax(0,1fr))}}
@media(max-width:680px){main{padding:10px 10px 32px}.panels{grid-template-columns:minmax(0,1fr)}
h1{font-size:20px}section,.verdict{padding:12px 12px 14px}.scale{float:none;margin:4px 0;
flex-wrap:wrap}.wide .cell{display:none}.wide .roomy text{font-size:21px}}
@media print{body{background:#fff}section,.verdict{break-inside:avoid}}
""".strip()
