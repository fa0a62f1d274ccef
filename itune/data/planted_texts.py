"""What planting puts into rows: broken answers, refusals, other scripts and languages, made-up secrets."""

# ruff: noqa: RUF001 (letters of other scripts are the point)

from __future__ import annotations

EMPTY = (
    "", " ", "\n", "\n\n", "\u200b", "...", "-", ".", "\t", "—",
)

PLACEHOLDERS = (
    "TODO", "TBD", "N/A", "[insert answer here]", "<answer>", "Your answer here", "[Your response]", "{{response}}",
    "null", "NULL", "undefined", "lorem ipsum dolor sit amet", "xxx", "PLACEHOLDER", "<noinput>", "nan",
    "[RESPONSE]", "{answer}", "TODO: write the answer", "(to be filled in)", "[ANSWER GOES HERE]", "<output>",
    "...TBD...", "Insert text here.", "Lorem ipsum dolor sit amet, consectetur adipiscing elit.", "???", "None.",
    "___", "[no output]", "answer pending",
)

REFUSAL = (
    (
        "I'm sorry, but", "Sorry,", "I apologize, but", "Unfortunately,", "", "", "As an AI language model,",
        "I regret that", "My apologies,", "I am afraid that",
    ),
    (
        "I can't help with that.", "I cannot assist with this request.",
        "I am not able to provide that information.", "I'm unable to answer this question.",
        "I can't fulfill this request.", "I am unable to do that.", "I won't be able to help with that.",
        "I do not have access to that information.", "I must decline to answer.",
        "I don't have the ability to do this.", "I cannot comply with this request.", "I can not answer that.",
    ),
    (
        "", "", "Please ask something else.", "It goes against my guidelines.", "I was not designed for this.",
        "Is there anything else I can help you with?", "I have no personal opinions.",
    ),
)

OTHER_SCRIPTS = (
    "Это правильный ответ на вопрос.", "Москва является столицей России.", "Я думаю, что это хорошая идея.", "да",
    "нет", "这是一个很好的问题。", "我认为答案是正确的。", "北京", "是的，没错。", "これは正しい答えです。",
    "はい、そうです。", "東京", "네, 맞습니다.", "이것이 정답입니다.", "هذا هو الجواب الصحيح.",
    "نعم، هذا صحيح تماما.", "यह सही उत्तर है।", "हाँ, यह सही है।", "Αυτή είναι η σωστή απάντηση.",
    "นี่คือคำตอบที่ถูกต้อง", "זו התשובה הנכונה.", "কলকাতা একটি বড় শহর।", "Ես կարծում եմ, որ դա ճիշտ է։",
    "ეს სწორი პასუხია.",
)

OTHER_LANGUAGES = (
    "La respuesta correcta es la segunda opción, porque la primera no tiene sentido.",
    "No estoy seguro, pero creo que el autor habla de su infancia en el campo.",
    "Los niños juegan en el parque mientras sus padres preparan la comida.",
    "Es una película muy buena y la recomiendo a todos.",
    "La bonne réponse est la deuxième, car la première ne convient pas.",
    "Je pense que les personnages sont très bien écrits dans ce roman.",
    "Le chat dort sur le canapé pendant que la famille prépare le dîner.",
    "C'est une question difficile, mais il y a une solution simple.",
    "Die richtige Antwort ist die zweite, weil die erste keinen Sinn ergibt.",
    "Ich glaube, dass der Film nicht so gut ist wie das Buch.",
    "Das Kind spielt mit dem Ball und der Hund läuft hinterher.",
    "Es gibt viele Gründe, warum wir das nicht tun sollten.",
    "La risposta giusta è la seconda, perché la prima non ha senso.",
    "Il gatto dorme sul divano mentre la famiglia prepara la cena.",
    "Non sono sicuro, ma penso che il film sia molto bello.",
    "A resposta certa é a segunda, porque a primeira não faz sentido.",
    "As crianças brincam no parque enquanto os pais preparam o almoço.",
    "Eu acho que o livro é muito melhor do que o filme.",
    "Het juiste antwoord is het tweede, omdat het eerste niet klopt.",
    "De kat slaapt op de bank terwijl het gezin het eten klaarmaakt.",
    "Jag tror att det rätta svaret är det andra, eftersom det första inte stämmer.",
    "Myślę, że to nie jest dobra odpowiedź, ale nie jestem pewien.",
    "Bence doğru cevap ikincisi, çünkü birincisi bir anlam ifade etmiyor.",
    "Jawaban yang benar adalah yang kedua, karena yang pertama tidak masuk akal.",
    "Jeg tror ikke at det er en god idé, men vi kan prøve det.",
)

ASKS_FOR_INPUT = (
    "Summarize the following article:", "Translate this sentence into French.",
    "Correct the grammar in the text below.", "What is the sentiment of the given review?",
    "Classify the following email as spam or not spam.", "Rewrite the paragraph below in a formal tone.",
    "Find the errors in the following code.", "Answer the question below.",
    "Given the passage, who is the main character?", "Extract all the dates from the text provided.",
    "Sort the following list of numbers in ascending order.", "Edit this essay for clarity.",
    "Read the passage below and answer the question.", "Paraphrase the given sentence.",
    "Explain what this code does.", "Identify the nouns in the sentence.", "Write a title for the article above.",
    "Complete the following sentence.", "Based on the table below, which year had the most sales?",
    "Suggest a better word for the underlined one in this text.",
)

# split in two, so that no scanner takes this file for a leak
_SECRET_PARTS = (
    ("AKIA", "Q3EGXAMPLEKEY7ZB"),
    ("ghp_", "16C7e42F292c6912E7710c838347Ae178B4a"),
    ("sk-", "proj9f3kQ2mZx8Lr7TtVbNw4Yc6Hj1Dp5Sg0"),
    ("xoxb-", "263594206564-2343594206574-FGqddMF8t08v8N7Oq4i57vs1"),
    ("AIza", "SyA9bCdEfGhIjKlMnOpQrStUvWxYz01234Q"),
    ("-----BEGIN RSA ", "PRIVATE KEY-----"),
    ("postgres://admin:", "hunter2pass@db.internal:5432/main"),
    ("password", " = 'Tr0ub4dor&3xyz'"),
    ("api_key", '="9b2f7c1d8e3a4f5b6c7d8e9f0a1b2c3d"'),
    ("hf_", "QwErTyUiOpAsDfGhJkLzXcVbNmQwErTyUi"),
    ("eyJhbGciOiJIUzI1NiJ9.", "eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"),
    ("glpat-", "x7Yb2Kq9LmZr4TnWcV8s"),
)
SECRETS = tuple(first + second for first, second in _SECRET_PARTS)

PERSONAL = (
    "anna.keller@posteo.de", "Write to j.smith42@gmail.com today.", "+1 (415) 555-0132", "Call 212-555-0187.",
    "+44 20 7946 0958", "SSN 536-22-8726", "4111 1111 1111 1111", "5500-0000-0000-0004", "DE89 3704 0044 0532 0130 00",
    "203.0.113.77", "My number is (303) 555-0175.", "GB82WEST12345698765432",
)
