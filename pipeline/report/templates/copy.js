// Buttons that copy the text of the element before them; without this script they stay hidden.
(() => {
  const told = document.getElementById("copied");
  const select = (text) => {
    text.hidden = false;
    const range = document.createRange();
    range.selectNodeContents(text);
    getSelection().removeAllRanges();
    getSelection().addRange(range);
  };
  for (const button of document.querySelectorAll("button.copier")) {
    const text = button.previousElementSibling;
    let timer = 0;
    const say = (word) => {
      button.textContent = word;
      told.textContent = `${word}: ${text.textContent}`;
      clearTimeout(timer);
      timer = setTimeout(() => { button.textContent = "Copy"; told.textContent = ""; }, 3000);
    };
    const offer = () => { select(text); say("Selected"); };
    button.addEventListener("click", () => {
      // Some browsers have no clipboard for a page that was opened as a file, or refuse it.
      if (!navigator.clipboard) return offer();
      navigator.clipboard.writeText(text.textContent).then(() => say("Copied"), offer);
    });
    button.hidden = false;
  }
})();
