"""Colours and sizes: the system's fonts, light and dark, and no files from elsewhere."""

import gradio as gr

THEME = gr.themes.Default(
    primary_hue="teal",
    neutral_hue="slate",
    font=["system-ui", "Segoe UI", "Roboto", "sans-serif"],
    font_mono=["ui-monospace", "Consolas", "monospace"],
)

CSS = """
.ntp-note { border: 1px solid var(--border-color-primary); border-left-width: 5px; border-radius: 6px;
  padding: 8px 12px; margin: 4px 0; line-height: 1.45; overflow-wrap: anywhere; }
.ntp-info { border-left-color: #00798c; } .ntp-good { border-left-color: #2f9e63; }
.ntp-warning { border-left-color: #d99000; } .ntp-bad { border-left-color: #d1495b; }
.ntp-scroll { overflow-x: auto; margin: 8px 0; }
.ntp-table, .ntp-table tr { border: 0 !important; }
.ntp-table { border-collapse: collapse; width: 100%; font-size: 0.92em; }
.ntp-table th, .ntp-table td { padding: 5px 10px; border-style: solid !important;
  border-width: 0 0 1px !important; text-align: left; font-weight: 400; }
.gradio-container .ntp-table :is(tr, th, td) { border-color: var(--border-color-primary) !important; }
.ntp-table thead th { font-weight: 600; vertical-align: bottom; }
.ntp-table .ntp-number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.ntp-table thead .ntp-number { white-space: normal; }
.ntp-table tbody th { min-width: 6em; }
.ntp-picture { width: 100%; max-width: 860px; height: auto; border-radius: 6px; background: white; }
.ntp-bars { max-height: 26em; overflow-y: auto; font-size: 0.9em; }
.ntp-bar { display: grid; grid-template-columns: minmax(0, 5fr) minmax(60px, 4fr) 9em; gap: 4px 12px;
  align-items: center; padding: 3px 0; }
.ntp-name { overflow-wrap: anywhere; }
.ntp-track { background: var(--border-color-primary); height: 12px; border-radius: 3px; overflow: hidden; }
.ntp-track > span { display: block; height: 100%; background: #00798c; }
.ntp-share { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.ntp-digest { overflow-wrap: anywhere; font-size: 0.85em; }
.ntp-words h3 { margin: 18px 0 4px; font-weight: 600; font-size: 1.1em; }
.ntp-words p { margin: 6px 0; line-height: 1.5; overflow-wrap: anywhere; }
.ntp-words ul { margin: 4px 0 8px; padding-left: 1.3em; list-style: disc; line-height: 1.5; }
.ntp-words summary { cursor: pointer; padding: 4px 0; }
.ntp-words :focus-visible { outline: 2px solid #00798c; outline-offset: 2px; }
#seen p { margin: 4px 0; font-size: 0.9em; }
.ntp-seen { border-radius: 6px; border: 1px solid var(--border-color-primary); }
.ntp-label { font-size: 0.9em; margin-bottom: 4px; }
.ntp-paper canvas { display: block; width: 100%; max-width: 280px; aspect-ratio: 1; background: white;
  border: 1px solid var(--border-color-accent); border-radius: 6px; touch-action: none; cursor: crosshair; }
.ntp-paper button { margin-top: 6px; }
.ntp-paper button, .ntp-examples button { border: 1px solid var(--border-color-primary); border-radius: 6px;
  background: var(--button-secondary-background-fill); color: var(--body-text-color); padding: 4px 14px;
  cursor: pointer; }
.ntp-examples > div:last-child { display: flex; flex-wrap: wrap; gap: 6px; }
.ntp-examples button { padding: 3px; display: grid; justify-items: center; font-size: 0.85em; }
.html-container { padding-left: 0 !important; padding-right: 0 !important; }
.ntp-examples button { margin: 0 !important; line-height: 1.3; }
.ntp-examples button > * { margin: 0 !important; }
.ntp-examples img { width: 56px; height: 56px; image-rendering: pixelated; border-radius: 4px; }
.ntp-paper button:hover, .ntp-examples button:hover { border-color: #00798c; }
.ntp-paper button:focus-visible, .ntp-examples button:focus-visible {
  outline: 2px solid #00798c; outline-offset: 1px; }
@media (max-width: 600px) {
  .gradio-container { padding: 8px !important; }
  .tab-container button { padding: 0 9px !important; font-size: 14px; }
  .ntp-table th, .ntp-table td { padding: 5px 6px; }
  .ntp-examples img { width: 48px; height: 48px; }
  .ntp-bar { grid-template-columns: 1fr 9em; } .ntp-name { grid-column: 1 / 3; }
}
"""
