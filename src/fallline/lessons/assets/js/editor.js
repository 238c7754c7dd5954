// The editor of a code cell: CodeMirror 6 with the page's own colours. Tab leaves it, so that the keyboard is never caught.

import {
  bracketMatching, closeBrackets, closeBracketsKeymap, defaultKeymap, drawSelection, EditorState, EditorView,
  highlightSpecialChars, HighlightStyle, history, historyKeymap, indentOnInput, indentUnit, keymap, python,
  syntaxHighlighting, tags,
} from "../vendor/codemirror.js";

const nonce = document.querySelector('meta[name="style-nonce"]').content;

const look = EditorView.theme({
  "&": { color: "var(--ink)", backgroundColor: "var(--card)" },
  "&.cm-focused": { outline: "3px solid var(--accent)", outlineOffset: "-3px" },
  ".cm-scroller": { fontFamily: "var(--mono)", lineHeight: "1.55", overflowX: "auto" },
  ".cm-content": { padding: "0.8rem 0", caretColor: "var(--ink)" },
  ".cm-line": { padding: "0 1rem" },
  ".cm-cursor": { borderLeftColor: "var(--ink)" },
  "&.cm-focused > .cm-scroller > .cm-selectionLayer .cm-selectionBackground, .cm-selectionBackground": {
    backgroundColor: "color-mix(in srgb, var(--accent) 30%, transparent)",
  },
  "&.cm-focused .cm-matchingBracket": { backgroundColor: "var(--wash)" },
});

const colours = HighlightStyle.define([
  { tag: [tags.keyword, tags.operatorKeyword, tags.bool, tags.null], color: "var(--keyword)", fontWeight: "500" },
  { tag: [tags.string, tags.special(tags.string)], color: "var(--string)" },
  { tag: tags.number, color: "var(--number)" },
  { tag: tags.comment, color: "var(--comment)" },
  { tag: [tags.function(tags.definition(tags.variableName)), tags.definition(tags.className)], color: "var(--function)" },
]);

/**
 * Puts an editor in the place of a listing.
 * @param {HTMLElement} parent the place
 * @param {string} code what it starts with
 * @param {string} label its name for those who cannot see it
 * @param {{run: () => void, runAndNext: () => void, changed: () => void}} does what keys and typing do
 */
export function makeEditor(parent, code, label, does) {
  const press = (action) => () => (action(), true);
  const editor = new EditorView({
    parent,
    state: EditorState.create({
      doc: code,
      extensions: [
        EditorView.cspNonce.of(nonce),
        keymap.of([
          { key: "Ctrl-Enter", mac: "Cmd-Enter", run: press(does.run), preventDefault: true },
          { key: "Ctrl-Enter", run: press(does.run), preventDefault: true },
          { key: "Shift-Enter", run: press(does.runAndNext), preventDefault: true },
        ]),
        highlightSpecialChars(), history(), drawSelection(), indentOnInput(), bracketMatching(), closeBrackets(),
        indentUnit.of("    "),
        python(),
        syntaxHighlighting(colours),
        look,
        EditorView.contentAttributes.of({ "aria-label": label, tabindex: "0", spellcheck: "false", autocapitalize: "off" }),
        EditorView.updateListener.of((update) => { if (update.docChanged) does.changed(); }),
        keymap.of([...closeBracketsKeymap, ...defaultKeymap, ...historyKeymap]),
      ],
    }),
  });
  // CodeMirror draws the lines near the window only, unless it prints. Cells are short: all their lines are drawn, so that
  // a search in the page, a picture of it and a screen reader find them.
  editor.viewState.printing = true;
  editor.requestMeasure();
  return editor;
}

/** Replaces all of an editor's code. */
export function setCode(editor, code) {
  editor.dispatch({ changes: { from: 0, to: editor.state.doc.length, insert: code } });
}
